# What people type. Each target says what it does; `make` alone lists them.
SHELL := /bin/bash
CARGO ?= cargo
export PATH := $(PATH):$(or $(CARGO_HOME),$(HOME)/.cargo)/bin

.PHONY: help setup build demo test test-again bench bench-labels fuzz lint clean
help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## install what building and testing need (Debian or Ubuntu, root); says each step
	@.ci/setup

build: setup ## watcher and ztunnel, optimised, in target/release
	$(CARGO) build --release --locked --workspace --bins

demo: setup ## two nodes, four pods, real kernel programs, real HBONE, on this machine (root)
	@$(CARGO) build --release --locked --workspace --bins --quiet
	@$(CARGO) run --release --locked --quiet -p watcher --example demo

test: setup ## every test, privileged ones too (root)
	@.ci/test

test-again: ## the tests once more: what the first run left would show
	@.ci/test

bench: setup ## direct against through the mesh, side by side; PEER_BIN=… beside another ztunnel (root)
	@$(CARGO) build --release --locked --workspace --bins --quiet
	@$(CARGO) run --release --locked --quiet -p watcher --example bench

bench-labels: setup ## from a label at a real API server to open pods and back, ROUNDS=… of PODS="1 20 60" (root)
	@$(CARGO) build --release --locked -p watcher --bins --quiet
	@# The API server, on another machine in real life, collects its garbage less often: that would be in the result.
	@GOGC=400 $(CARGO) run --release --locked --quiet -p watcher --example labels

fuzz: setup ## input that breaks a parser others can reach, each looked for during SECONDS=60
	@SECONDS_EACH=$(or $(SECONDS),60) .ci/fuzz

lint: ## formatting, clippy, licences
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --locked -- -D warnings
	$(CARGO) deny --offline check licenses bans sources

clean: ## remove what was built
	$(CARGO) clean
	$(CARGO) clean --manifest-path ebpf/programs/Cargo.toml
