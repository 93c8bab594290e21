// Command cluster is a Kubernetes control plane, a kubelet, kubeadm and kubectl in one binary, so that the tests of pintle
// run against the real thing. The first argument names the program to be; the rest are its own flags:
//
//	cluster etcd --data-dir DIR …
//	cluster kube-apiserver --etcd-servers URL …
//	cluster kube-controller-manager --kubeconfig FILE …
//	cluster kubelet --config FILE …
//	cluster kubeadm join …
//	cluster kubectl get csr
//	cluster fake-runtime unix:///run/fake.sock
//
// Others are clients and servers written for the tests:
//
//	cluster echo-kubelet --address 127.0.0.1:10250
//	cluster load --kubeconfig FILE --get /version …
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"go.etcd.io/etcd/server/v3/etcdmain"
	"k8s.io/component-base/cli"
	_ "k8s.io/component-base/logs/json/register"
	_ "k8s.io/component-base/metrics/prometheus/clientgo"
	_ "k8s.io/component-base/metrics/prometheus/version"
	"k8s.io/cri-client/pkg/fake"
	kubectl "k8s.io/kubectl/pkg/cmd"
	apiserver "k8s.io/kubernetes/cmd/kube-apiserver/app"
	controllermanager "k8s.io/kubernetes/cmd/kube-controller-manager/app"
	kubeadm "k8s.io/kubernetes/cmd/kubeadm/app/cmd"
	kubelet "k8s.io/kubernetes/cmd/kubelet/app"
)

func main() {
	if len(os.Args) < 2 {
		fmt.Fprintln(os.Stderr, "usage: cluster etcd|kube-apiserver|kube-controller-manager|kubelet|kubeadm|kubectl|fake-runtime|echo-kubelet|load [FLAGS]")
		os.Exit(2)
	}
	program := os.Args[1]
	os.Args = append([]string{program}, os.Args[2:]...)

	// Each constructor below installs the process's signal handler, and a second one panics: build only the requested one.
	switch program {
	case "etcd":
		etcdmain.Main(os.Args)
	case "kube-apiserver":
		os.Exit(cli.Run(apiserver.NewAPIServerCommand()))
	case "kube-controller-manager":
		os.Exit(cli.Run(controllermanager.NewControllerManagerCommand()))
	case "kubelet":
		os.Exit(cli.Run(kubelet.NewKubeletCommand(context.Background())))
	case "kubeadm":
		os.Exit(cli.Run(kubeadm.NewKubeadmCommand(os.Stdin, os.Stdout, os.Stderr)))
	case "kubectl":
		os.Exit(cli.Run(kubectl.NewDefaultKubectlCommand()))
	case "fake-runtime":
		runFakeRuntime(os.Args[1:])
	case "echo-kubelet":
		end(runEchoKubelet(os.Args[1:]))
	case "load":
		end(runLoad(os.Args[1:]))
	default:
		fmt.Fprintf(os.Stderr, "cluster: unknown program %q\n", program)
		os.Exit(2)
	}
}

// end exits with the result of a program that does not use cobra.
func end(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// runFakeRuntime serves the container runtime interface that a kubelet requires, without running containers.
func runFakeRuntime(arguments []string) {
	if len(arguments) != 1 {
		fmt.Fprintln(os.Stderr, "usage: cluster fake-runtime unix:///PATH")
		os.Exit(2)
	}
	runtime := fake.NewFakeRemoteRuntime()
	if err := runtime.Start(arguments[0]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM, syscall.SIGINT)
	<-stop
	runtime.Stop()
}
