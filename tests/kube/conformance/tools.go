//go:build tools

// Package conformance_test keeps in go.mod what is built beside the suite.
package conformance_test

import (
	_ "istio.io/istio/pkg/test/echo/cmd/client"
	_ "istio.io/istio/pkg/test/echo/cmd/server"
)
