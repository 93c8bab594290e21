// Command client_go obtains a node's first certificate as a kubelet does, with client-go's certificate manager, and exits
// once the pair is current:
//
//	client_go BOOTSTRAP-KUBECONFIG CERT-DIR NODE-NAME
package main

import (
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"os"
	"time"

	certificates "k8s.io/api/certificates/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/util/certificate"
)

// store is a file store that signals when the first pair has become current.
type store struct {
	certificate.Store
	updated chan struct{}
}

func (s *store) Update(certificate, key []byte) (*tls.Certificate, error) {
	pair, err := s.Store.Update(certificate, key)
	if err == nil {
		close(s.updated)
	}
	return pair, err
}

func run(bootstrapKubeconfig, directory, node string) error {
	config, err := clientcmd.BuildConfigFromFlags("", bootstrapKubeconfig)
	if err != nil {
		return err
	}
	clientset, err := kubernetes.NewForConfig(config)
	if err != nil {
		return err
	}
	files, err := certificate.NewFileStore("kubelet-client", directory, directory, "", "")
	if err != nil {
		return err
	}
	store := &store{Store: files, updated: make(chan struct{})}
	manager, err := certificate.NewManager(&certificate.Config{
		ClientsetFn: func(*tls.Certificate) (kubernetes.Interface, error) { return clientset, nil },
		Template: &x509.CertificateRequest{
			Subject: pkix.Name{CommonName: "system:node:" + node, Organization: []string{"system:nodes"}},
		},
		SignerName:       certificates.KubeAPIServerClientKubeletSignerName,
		GetUsages:        certificate.DefaultKubeletClientGetUsages,
		CertificateStore: store,
	})
	if err != nil {
		return err
	}
	manager.Start()
	defer manager.Stop()
	select {
	case <-store.updated:
		return nil
	case <-time.After(time.Minute):
		return fmt.Errorf("no certificate within a minute")
	}
}

func main() {
	if len(os.Args) != 4 {
		fmt.Fprintln(os.Stderr, "usage: client_go BOOTSTRAP-KUBECONFIG CERT-DIR NODE-NAME")
		os.Exit(2)
	}
	if err := run(os.Args[1], os.Args[2], os.Args[3]); err != nil {
		fmt.Fprintln(os.Stderr, "error:", err)
		os.Exit(1)
	}
}
