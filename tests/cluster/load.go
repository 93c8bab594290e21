// The load program: clients that send requests continuously with a kubeconfig, and count the results.
//
//	cluster load --kubeconfig FILE --duration 2m --get /version --post /apis/… --body '{…}'
//
// It uses Kubernetes' own clients: net/http as client-go configures it, and client-go's rest client on top of that.
// Each of the two uses HTTP/1.1 and HTTP/2, over kept-alive connections and with a new one for each request. Nothing here
// retries: a request that net/http does not retry by its own rules is a failure.
//
// It prints a line of JSON once every client has received a response, and another one with the counts when it ends: after
// the duration, or on SIGTERM. It waits for requests in flight.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	utilnet "k8s.io/apimachinery/pkg/util/net"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

// patience is the timeout of a request, far longer than any needs, so that only one that hangs is counted.
const patience = 30 * time.Second

// examplesShown is how many failures are reported in full.
const examplesShown = 10

// loadOptions are the flags of the load program.
type loadOptions struct {
	kubeconfig string
	duration   time.Duration
	interval   time.Duration
	sharing    int
	gets       repeated
	posts      repeated
	body       string
}

// repeated is a flag that may be given several times.
type repeated []string

func (r *repeated) String() string { return strings.Join(*r, " ") }

func (r *repeated) Set(value string) error {
	*r = append(*r, value)
	return nil
}

// way is a combination of client, protocol and connection handling, each of which has a worker.
type way struct {
	Client      string `json:"client"`
	Protocol    string `json:"protocol"`
	Connections string `json:"connections"`
}

// tally counts the results of the requests of one method in one way.
type tally struct {
	way
	Method   string `json:"method"`
	Answered int    `json:"answered"`
	Failed   int    `json:"failed"`
}

// report is printed at the end.
type report struct {
	Seconds     float64        `json:"seconds"`
	Requests    int            `json:"requests"`
	Answered    int            `json:"answered"`
	Failed      int            `json:"failed"`
	Connections int            `json:"connections"`
	Failures    map[string]int `json:"failures"`
	Examples    []string       `json:"examples"`
	By          []*tally       `json:"by"`
}

// ledger collects the report while the workers run.
type ledger struct {
	sync.Mutex
	report
}

func runLoad(arguments []string) error {
	var options loadOptions
	flags := flag.NewFlagSet("load", flag.ExitOnError)
	flags.StringVar(&options.kubeconfig, "kubeconfig", "", "whom to ask, and as whom")
	flags.DurationVar(&options.duration, "duration", time.Minute, "how long at most")
	flags.DurationVar(&options.interval, "interval", 0, "from the beginning of a client's request to the next one's, at least")
	flags.IntVar(&options.sharing, "sharing", 3, "how many clients of each kind share connections that are kept; with 1, each has its own")
	flags.Var(&options.gets, "get", "a path to GET; may be repeated")
	flags.Var(&options.posts, "post", "a path to POST to; may be repeated")
	flags.StringVar(&options.body, "body", "{}", "the JSON body of each POST")
	if err := flags.Parse(arguments); err != nil {
		return err
	}
	if len(options.gets)+len(options.posts) == 0 {
		return errors.New("there is nothing to ask for: --get, --post")
	}
	config, err := clientcmd.BuildConfigFromFlags("", options.kubeconfig)
	if err != nil {
		return err
	}
	// client-go would limit the load to five requests per second.
	config.QPS = -1
	config.UserAgent = "load"

	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, options.duration)
	defer cancel()

	var counts ledger
	counts.Failures = map[string]int{}
	began := time.Now()
	var warm, done sync.WaitGroup
	for _, client := range []string{"net/http", "client-go"} {
		for _, protocol := range []string{"HTTP/1.1", "HTTP/2.0"} {
			for _, connections := range []string{"kept", "fresh"} {
				workers := 1
				if connections == "kept" {
					workers = options.sharing
				}
				for range workers {
					worker, err := newWorker(way{client, protocol, connections}, config, workers > 1, &counts)
					if err != nil {
						return err
					}
					warm.Add(1)
					done.Go(func() { worker.run(ctx, &options, warm.Done) })
				}
			}
		}
	}
	warm.Wait()
	if err := json.NewEncoder(os.Stdout).Encode(map[string]string{"event": "running"}); err != nil {
		return err
	}
	done.Wait()
	counts.Seconds = time.Since(began).Seconds()
	return json.NewEncoder(os.Stdout).Encode(counts.report)
}

// asker sends a request, and returns the protocol of its complete response.
type asker func(ctx context.Context, method, path string, body io.Reader) (string, error)

// worker sends requests in one way, one after the other.
type worker struct {
	way
	counts *ledger
	// open returns a function that sends a request, and one that closes the connections opened for it.
	open func() (asker, func(), error)
}

func newWorker(way way, config *rest.Config, shared bool, counts *ledger) (*worker, error) {
	config = rest.CopyConfig(config)
	if way.Protocol == "HTTP/1.1" {
		config.NextProtos = []string{"http/1.1"}
	}
	askerOf := netHTTPAsker
	if way.Client == "client-go" {
		askerOf = clientGoAsker
	}
	if !shared {
		// client-go shares one transport among all clients of equal configuration, except where it cannot compare them:
		// functions.
		config.Proxy = func(*http.Request) (*url.URL, error) { return nil, nil }
	}
	open := func() (asker, func(), error) { return askerOf(config) }
	if way.Connections == "fresh" {
		// With the files' content in the configuration, client-go starts nothing to watch them.
		return &worker{way, counts, open}, rest.LoadTLSFiles(config)
	}
	ask, _, err := open()
	kept := func() (asker, func(), error) { return ask, func() {}, nil }
	return &worker{way, counts, kept}, err
}

func netHTTPAsker(config *rest.Config) (asker, func(), error) {
	client, err := rest.HTTPClientFor(config)
	if err != nil {
		return nil, nil, err
	}
	ask := func(ctx context.Context, method, path string, body io.Reader) (string, error) {
		request, err := http.NewRequestWithContext(ctx, method, config.Host+path, body)
		if err != nil {
			return "", err
		}
		request.Header.Set("Content-Type", "application/json")
		response, err := client.Do(request)
		if err != nil {
			return "", err
		}
		defer response.Body.Close()
		if _, err := io.Copy(io.Discard, response.Body); err != nil {
			return "", err
		}
		if response.StatusCode/100 != 2 {
			return "", errors.New("status " + response.Status)
		}
		return response.Proto, nil
	}
	return ask, func() { utilnet.CloseIdleConnectionsFor(client.Transport) }, nil
}

func clientGoAsker(config *rest.Config) (asker, func(), error) {
	config = rest.CopyConfig(config)
	config.NegotiatedSerializer = scheme.Codecs.WithoutConversion()
	client, err := rest.HTTPClientFor(config)
	if err != nil {
		return nil, nil, err
	}
	// The rest client's result does not include the protocol.
	proto, transport := "", client.Transport
	client.Transport = roundTripper(func(request *http.Request) (*http.Response, error) {
		response, err := transport.RoundTrip(request)
		if err == nil {
			proto = response.Proto
		}
		return response, err
	})
	restClient, err := rest.UnversionedRESTClientForConfigAndClient(config, client)
	if err != nil {
		return nil, nil, err
	}
	ask := func(ctx context.Context, method, path string, body io.Reader) (string, error) {
		// The rest client would retry where net/http does not.
		request := restClient.Verb(method).AbsPath(path).MaxRetries(0)
		if replayable, ok := body.(*bytes.Reader); ok {
			content, err := io.ReadAll(replayable)
			if err != nil {
				return "", err
			}
			request = request.Body(content)
		} else if body != nil {
			request = request.Body(body)
		}
		_, err := request.SetHeader("Content-Type", "application/json").Do(ctx).Raw()
		return proto, err
	}
	return ask, func() { utilnet.CloseIdleConnectionsFor(transport) }, nil
}

// roundTripper is a function as an http.RoundTripper.
type roundTripper func(*http.Request) (*http.Response, error)

func (r roundTripper) RoundTrip(request *http.Request) (*http.Response, error) { return r(request) }

// run sends requests until the context ends, and calls warm after the first response.
func (w *worker) run(ctx context.Context, options *loadOptions, warm func()) {
	var warmed sync.Once
	defer warmed.Do(warm)
	for number := 0; ctx.Err() == nil; number++ {
		next := time.After(options.interval)
		method, path := http.MethodGet, ""
		var body io.Reader
		if choice := number % (len(options.gets) + 2*len(options.posts)); choice < len(options.gets) {
			path = options.gets[choice]
		} else {
			// Every second one has a body that can be read only once, so that net/http cannot begin again with it. It also
			// cannot where it has only looked at an HTTP/2 connection on which others are told to go away at that moment: it
			// closes the body before it tries another one (golang/go#62450). That is so with every server that says GOAWAY,
			// and client-go's own bodies can be read again.
			choice -= len(options.gets)
			method, path, body = http.MethodPost, options.posts[choice/2], bytes.NewReader([]byte(options.body))
			if choice%2 == 1 && (w.Protocol != "HTTP/2.0" || w.Connections == "fresh") {
				body = io.NopCloser(body)
			}
		}
		opened, err := w.ask(method, path, body)
		w.counts.note(w.counts.of(w.way, method), path, opened, err)
		if err == nil {
			warmed.Do(warm)
		}
		if options.interval > 0 {
			select {
			case <-next:
			case <-ctx.Done():
			}
		}
	}
}

// ask sends a request, and returns how many connections were opened for it.
func (w *worker) ask(method, path string, body io.Reader) (opened int, err error) {
	ask, close, err := w.open()
	if err != nil {
		return 0, err
	}
	defer close()
	// Not the context of the load: requests in flight at its end must complete.
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		GotConn: func(connection httptrace.GotConnInfo) {
			if !connection.Reused {
				opened++
			}
		},
	})
	protocol, err := ask(ctx, method, path, body)
	if err == nil && protocol != w.Protocol {
		err = fmt.Errorf("answered in %s", protocol)
	}
	return opened, err
}

// of returns the tally for this way and method.
func (l *ledger) of(way way, method string) *tally {
	l.Lock()
	defer l.Unlock()
	for _, known := range l.By {
		if known.way == way && known.Method == method {
			return known
		}
	}
	added := &tally{way: way, Method: method}
	l.By = append(l.By, added)
	return added
}

// note counts a request.
func (l *ledger) note(of *tally, path string, opened int, err error) {
	l.Lock()
	defer l.Unlock()
	l.Requests++
	l.Connections += opened
	if err == nil {
		l.Answered++
		of.Answered++
		return
	}
	l.Failed++
	of.Failed++
	l.Failures[kindOf(err)]++
	if len(l.Examples) < examplesShown {
		l.Examples = append(l.Examples, fmt.Sprintf("%s %s %s %s %s: %v", of.Client, of.Protocol, of.Connections, of.Method, path, err))
	}
}

// kindOf classifies a failure.
func kindOf(err error) string {
	var status apierrors.APIStatus
	if errors.As(err, &status) {
		return "status"
	}
	text := err.Error()
	for _, kind := range []struct{ words, kind string }{
		{"refused", "refused"},
		{"reset by peer", "reset"},
		{"broken pipe", "reset"},
		{"GOAWAY", "goaway"},
		{"closed idle connection", "closed while idle"},
		{"deadline exceeded", "timeout"},
		{"timeout", "timeout"},
		{"tls: ", "tls"},
		{"x509: ", "tls"},
		{"status ", "status"},
		{"EOF", "ended"},
	} {
		if strings.Contains(text, kind.words) {
			return kind.kind
		}
	}
	return "other"
}
