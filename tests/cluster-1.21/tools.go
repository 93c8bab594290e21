//go:build tools

package main

// The generator of the OpenAPI definitions, which the published module of Kubernetes 1.21 leaves out; see build.
import _ "k8s.io/kube-openapi/cmd/openapi-gen"
