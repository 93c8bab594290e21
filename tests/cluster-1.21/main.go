// Command cluster-1.21 is kube-apiserver and kube-controller-manager 1.21 in one binary, so that the tests of pintle run
// against the oldest release that it supports, whose signer counts certificate lifetimes differently. The first argument
// names the program to be; the rest are its own flags. etcd comes from the binary of ../cluster.
package main

import (
	"fmt"
	"os"

	"github.com/spf13/cobra"
	"k8s.io/component-base/logs"
	_ "k8s.io/component-base/metrics/prometheus/clientgo"
	_ "k8s.io/component-base/metrics/prometheus/version"
	apiserver "k8s.io/kubernetes/cmd/kube-apiserver/app"
	controllermanager "k8s.io/kubernetes/cmd/kube-controller-manager/app"
)

func main() {
	// Only the program that was asked for may be built: each constructor installs the process's signal handler, and a
	// second one panics.
	constructors := map[string]func() *cobra.Command{
		"kube-apiserver":          apiserver.NewAPIServerCommand,
		"kube-controller-manager": controllermanager.NewControllerManagerCommand,
	}
	if len(os.Args) < 2 || constructors[os.Args[1]] == nil {
		fmt.Fprintln(os.Stderr, "usage: cluster-1.21 kube-apiserver|kube-controller-manager [FLAGS]")
		os.Exit(2)
	}
	command := constructors[os.Args[1]]()
	os.Args = os.Args[1:]
	logs.InitLogs()
	defer logs.FlushLogs()
	if err := command.Execute(); err != nil {
		os.Exit(1)
	}
}
