# What people type. Each target installs what it needs and nothing else; `make` alone lists them.
SHELL := /bin/bash
CARGO ?= cargo
export PATH := $(PATH):$(or $(CARGO_HOME),$(HOME)/.cargo)/bin
PROGRAMS := -p watcher -p ztunnel -p ztunnel-control --bins

.PHONY: help setup build image demo test test-again e2e bench bench-labels bench-pushes bench-control fuzz lint clean
help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## install what any target needs (Debian or Ubuntu, root)
	@.ci/setup/for all

build: ## watcher, ztunnel and ztunnel-control, optimised, in target/release
	@.ci/setup/for build
	$(CARGO) build --release --locked $(PROGRAMS)

image: ## the container image as an OCI archive, target/oci/adit.tar; IMAGE=… names it
	@.ci/setup/for image
	@.ci/image

demo: ## two nodes, five pods, real kernel programs, real HBONE, on this machine (root)
	@.ci/demo

test: ## every test, privileged ones too (root)
	@.ci/test

test-again: ## what leaves traces, once more: what the first run left would show
	@.ci/test --again

e2e: ## in a cluster with real kubelets and containerd, installed by Helm (root)
	@.ci/test --e2e

bench: ## direct against through the mesh, side by side; PEER_BIN=… beside another ztunnel (root)
	@.ci/setup/for bench
	@$(CARGO) build --release --locked $(PROGRAMS)
	@$(CARGO) run --release --locked -p testbed --example bench

bench-labels: ## from a label at a real API server to open pods and back, ROUNDS=… of PODS="1 20 60" (root)
	@.ci/setup/for bench
	@$(CARGO) build --release --locked -p watcher --bins
	@# The API server, on another machine in real life, collects its garbage less often: that would be in the result.
	@GOGC=400 $(CARGO) run --release --locked -p testbed --example label_latency

bench-pushes: ## what pushes of a control plane cost because of CONNECTIONS=10000 open ones (root)
	@.ci/setup/for bench
	@$(CARGO) build --release --locked -p ztunnel --bins
	@$(CARGO) run --release --locked -p testbed --example pushes

bench-control: ## memory, latency and processor time of ztunnel-control in a cluster of PODS=10000
	@.ci/setup/for bench
	@$(CARGO) build --release --locked -p ztunnel-control --bins
	@$(CARGO) run --release --locked -p testbed --example control_plane

fuzz: ## input that breaks a parser others can reach, each looked for during SECONDS=60
	@.ci/setup/for fuzz
	@SECONDS_EACH=$(or $(SECONDS),60) .ci/fuzz

lint: ## format, lints, documentation, licences, known vulnerabilities, links
	@.ci/setup/for lint
	@.ci/lint

clean: ## remove what was built
	$(CARGO) clean
