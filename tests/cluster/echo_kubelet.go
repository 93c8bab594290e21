// The echo-kubelet program: serves the streaming requests of an API server with Kubernetes' own streaming server, and
// echoes the streams. It runs no containers.
//
//	cluster echo-kubelet --address 127.0.0.1:10250
//
// An executed command copies its standard input to its standard output, and a forwarded port returns what it receives. The
// log of every container is an endless sequence of numbers, one per line.
package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"flag"
	"fmt"
	"io"
	"math/big"
	"net/http"
	"time"

	"k8s.io/cri-streaming/pkg/streaming"
	"k8s.io/cri-streaming/pkg/streaming/portforward"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
)

// logInterval is the interval between log lines.
const logInterval = 20 * time.Millisecond

// echo is a container runtime that echoes every stream.
type echo struct{}

func (echo) ExecInContainer(_ context.Context, _, _, _ string, _ []string, in io.Reader, out, _ io.WriteCloser, _ bool, _ <-chan remotecommand.TerminalSize, _ time.Duration) error {
	_, err := io.Copy(out, in)
	return err
}

func (echo) PortForward(_ context.Context, _, _ string, _ int32, stream io.ReadWriteCloser) error {
	defer stream.Close()
	_, err := io.Copy(stream, stream)
	return err
}

func runEchoKubelet(arguments []string) error {
	flags := flag.NewFlagSet("echo-kubelet", flag.ExitOnError)
	address := flags.String("address", "127.0.0.1:10250", "where to listen")
	if err := flags.Parse(arguments); err != nil {
		return err
	}
	certificate, err := selfSigned()
	if err != nil {
		return err
	}
	config := streaming.DefaultConfig
	mux := http.NewServeMux()
	mux.HandleFunc("/exec/{namespace}/{pod}/{container}", func(w http.ResponseWriter, r *http.Request) {
		options, err := remotecommand.NewOptions(r)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		remotecommand.ServeExec(w, r, echo{}, r.PathValue("pod"), "", r.PathValue("container"), r.URL.Query()["command"], options,
			config.StreamIdleTimeout, config.StreamCreationTimeout, config.SupportedRemoteCommandProtocols)
	})
	mux.HandleFunc("/portForward/{namespace}/{pod}", func(w http.ResponseWriter, r *http.Request) {
		options, err := portforward.NewV4Options(r)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		portforward.ServePortForward(w, r, echo{}, r.PathValue("pod"), "", options,
			config.StreamIdleTimeout, config.StreamCreationTimeout, config.SupportedPortForwardProtocols)
	})
	mux.HandleFunc("GET /containerLogs/{namespace}/{pod}/{container}", serveLog)
	server := &http.Server{
		Addr:    *address,
		Handler: mux,
		// Without HTTP/2: an upgrade needs the whole connection.
		TLSConfig:    &tls.Config{Certificates: []tls.Certificate{certificate}},
		TLSNextProto: map[string]func(*http.Server, *tls.Conn, http.Handler){},
	}
	return server.ListenAndServeTLS("", "")
}

// serveLog streams a log as a kubelet does, flushing every chunk.
func serveLog(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "text/plain")
	ticks := time.NewTicker(logInterval)
	defer ticks.Stop()
	for number := 0; ; number++ {
		if _, err := fmt.Fprintln(w, number); err != nil {
			return
		}
		w.(http.Flusher).Flush()
		select {
		case <-ticks.C:
		case <-r.Context().Done():
			return
		}
	}
}

// selfSigned creates a self-signed certificate. An API server without a CA for kubelets does not verify it.
func selfSigned() (tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, err
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(24 * time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, err
}
