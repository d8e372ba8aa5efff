# What a person types. Every target installs what it needs and is missing (scripts/install-deps.sh).
# Everything is built with the release profile, so that the lab, the tests and CI compile once and
# run the same code; what measures runs what container images have (scripts/build-dist.sh). And everything is
# selected by `--workspace`: with `-p` cargo may choose other features, and compiles dependencies again.

SHELL := bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
LAB ?= demo
PROGRAMS := --workspace --bins

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | awk -F'\t' '{printf "  make %-14s %s\n", $$1, $$2}'

build: ## all programs, target/release/
	@scripts/install-deps.sh build
	cargo build --release $(PROGRAMS)

dist: ## the programs as container images have them, optimized with a profile, target/dist/ (root; some 25 minutes the first time)
	@scripts/install-deps.sh build lab dist
	scripts/build-dist.sh

lab: ## a demo mesh on this machine: builds, starts it, sends traffic, verifies, leaves it running (root)
	@scripts/install-deps.sh build lab
	cargo build --release $(PROGRAMS)
	@scripts/lab-demo.sh $(LAB)

lab-down: ## stop the demo mesh and remove every trace of it
	target/release/warren lab down --name $(LAB)

clean-lab: ## the same for all labs, also those whose `up` was killed
	target/release/warren lab down --all

check: ## the quick look: fmt, clippy, unit tests (a few minutes)
	@scripts/install-deps.sh build lab
	cargo fmt --all --check
	scripts/check-docs.sh
	cargo clippy --release --workspace --all-targets -- -D warnings
	cargo test --release --workspace --lib

test: ## every test but the soaks (root; up to 35 minutes cold on two cores)
	@scripts/install-deps.sh build lab test
	cargo build --release $(PROGRAMS)
	scripts/run-tests.sh

test-long: ## soaks, scale, outages on Kubernetes, the whole bench (root; two to three hours on an idle machine)
	@scripts/install-deps.sh build lab test bench kube
	cargo build --release $(PROGRAMS)
	$(MAKE) dist
	WARREN_TEST_LONG=1 scripts/run-tests.sh mesh
	tests/kube/run-tests long
	$(MAKE) bench

test-kube: ## on a real Kubernetes cluster of this machine (root; the first time 15 minutes to build it)
	@scripts/install-deps.sh build lab kube
	cargo build --release $(PROGRAMS)
	tests/kube/run-tests

bench: ## side by side: direct, Warren, Envoy; then bench-fleet; tables on the screen, JSON in target/bench/ (root)
	@scripts/install-deps.sh bench
	$(MAKE) dist
	target/dist/warren-bench run $(BENCH_ARGS)
	target/dist/warren-bench fleet $(FLEET_ARGS)

bench-fleet: ## the controller with 1,000 nodes and 50,000 pods, for minutes; narrow it with FLEET_ARGS
	$(MAKE) dist
	target/dist/warren-bench fleet $(FLEET_ARGS)

bench-micro: ## criterion: table lookup, endpoint pick, accept to first byte
	@scripts/install-deps.sh build
	cargo bench --profile dist -p warren-benches --benches

bench-smoke: ## does every bench run? a few seconds, no thresholds (root)
	@scripts/install-deps.sh build lab bench
	cargo build --release $(PROGRAMS)
	cargo test --release --workspace --bench '*'
	target/release/warren-bench run --smoke
	target/release/warren-bench fleet --smoke

charts: ## the Helm charts: lint, every document against the Kubernetes schemas, what they promise
	@scripts/install-deps.sh build charts
	cargo build --release $(PROGRAMS)
	deploy/dashboards/make.py --check
	target/venv/bin/python deploy/manifests/make.py --check
	target/venv/bin/python deploy/charts/tests/check.py target/release/warren

fuzz: ## every parser and codec under libFuzzer, FUZZ_SECONDS (600) each; FUZZ_TARGETS="a b" for some
	@scripts/install-deps.sh build
	scripts/fuzz.sh $(or $(FUZZ_SECONDS),600) $(FUZZ_TARGETS)

fuzz-smoke: ## the same for a fixed number of inputs, some 80 seconds and a build
	@scripts/install-deps.sh build
	FUZZ_RUNS=20000 scripts/fuzz.sh 4

deny: ## licences, sources, bans and duplicates of dependencies
	@scripts/install-deps.sh deny
	cargo deny check bans licenses sources

doc: ## API documentation, warnings denied
	@scripts/install-deps.sh build
	RUSTDOCFLAGS='-D warnings -A rustdoc::private_intra_doc_links' cargo doc --release --workspace --no-deps --document-private-items

.PHONY: help build dist lab lab-down clean-lab check test test-long test-kube bench bench-fleet bench-micro bench-smoke charts fuzz fuzz-smoke deny doc
