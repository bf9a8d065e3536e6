# The commands of Tasklane. Each does all of its own set-up and can be given twice.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules --no-print-directory

# rustup's programs, and what scripts/setup-tools installs, whether or not the shell knows them.
TASKLANE_TOOLS_DIR ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/tasklane/tools
export TASKLANE_TOOLS_DIR
export PATH := $(TASKLANE_TOOLS_DIR)/bin:$(PATH):$(HOME)/.cargo/bin

# One step after the other, even with -j: cargo uses all cores by itself.
.NOTPARALLEL:

SCRIPTS := .ci/run rabbitmq/up rabbitmq/down rabbitmq/lib.sh $(wildcard scripts/*)

say = @printf '\n\033[1m== %s\033[0m\n' "$(1)"

# Tests with services wait more than they compute: three at a time even on two cores (.config/nextest.toml).
CORES := $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
export NEXTEST_TEST_THREADS ?= $(shell echo $$(( $(CORES) > 3 ? $(CORES) : 3 )))

# How long each fuzz target runs.
SECONDS := 60

.PHONY: help demo programs test prove bench count check fuzz up down build fmt clean rust tools-check tools-test tools-fuzz services

help: ## this list
	@echo 'Tasklane: a task queue on RabbitMQ.'
	@sed -nE 's/^([a-z]+):[^#]*## (.*)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 16

demo: up programs ## real work over a real broker, then stays up until Ctrl-C (ONCE=1: ends by itself)
	$(call say,demo)
	"$${CARGO_TARGET_DIR:-target}/release/examples/demo"

programs: rust ## producer, worker, the command tasklane and the demo, optimised, in target/release
	$(call say,build: producer$(,) worker$(,) tasklane and the demo$(,) optimised)
	cargo build --release --bins --example demo

test: rust services tools-test ## all tests on private RabbitMQ and PostgreSQL nodes
	$(call say,build: tests$(,) and the programs that they start)
	cargo build --workspace --bins --tests --examples
	$(call say,test: examples in the documentation)
	cargo test --workspace --doc --quiet
	$(call say,test: units$(,) properties and integration)
	"$${CARGO_TARGET_DIR:-target}/debug/test-services" -- cargo nextest run --workspace --no-fail-fast

# RELEASE=1 builds optimised programs, which takes longer. The other variables go to the program as they are.
prove: export MINUTES := $(MINUTES)
prove: export SEED := $(SEED)
prove: export NODES := $(NODES)
prove: export KEEP := $(KEEP)
prove: rust services ## minutes of random faults under load, then a check of all that happened (MINUTES=3 SEED= NODES=1)
	$(call say,build: producer$(,) worker and the nemesis)
	cargo build --workspace --bins $(if $(RELEASE),--release)
	$(call say,prove)
	"$${CARGO_TARGET_DIR:-target}/$(if $(RELEASE),release,debug)/prove"

bench: export TASKS := $(TASKS)
bench: export REPEATS := $(REPEATS)
bench: export BYTES := $(BYTES)
bench: export PLACES := $(PLACES)
bench: export ROWS := $(ROWS)
bench: rust services ## what this machine does, beside the broker alone (TASKS= REPEATS= BYTES= PLACES= ROWS=e2e,drain,backlog…)
	$(call say,build: producer$(,) worker and the measurement$(,) optimised)
	cargo build --release -p tasklane-producer -p tasklane-worker -p tasklane-tests --bins
	$(call say,bench)
	"$${CARGO_TARGET_DIR:-target}/release/test-services" -- "$${CARGO_TARGET_DIR:-target}/release/bench"

count: rust services ## instructions that one task takes, by program, whatever else the machine does (needs valgrind)
	@command -v valgrind >/dev/null || { echo 'valgrind is missing: your package manager has it' >&2; exit 1; }
	$(call say,build: producer$(,) worker and the count$(,) optimised)
	cargo build --release -p tasklane-producer -p tasklane-worker -p tasklane-tests --bins
	$(call say,count)
	"$${CARGO_TARGET_DIR:-target}/release/test-services" -- "$${CARGO_TARGET_DIR:-target}/release/count-instructions"

check: rust tools-check ## formatting, lints, documentation, dependencies, spelling, scripts
	$(call say,check: Cargo.lock is current)
	cargo metadata --locked --format-version 1 >/dev/null
	$(call say,check: formatting)
	cargo fmt --all --check
	$(call say,check: lints)
	cargo clippy --workspace --all-targets -- --deny warnings
	$(call say,check: documentation)
	RUSTDOCFLAGS='--deny warnings' cargo doc --workspace --no-deps --quiet
	$(call say,check: licences$(,) bans and sources of dependencies)
	scripts/check-dependencies
	$(call say,check: unused dependencies)
	cargo machete
	$(call say,check: spelling)
	typos
	$(call say,check: scripts)
	if command -v shellcheck >/dev/null; then shellcheck --external-sources $(SCRIPTS); else echo 'no shellcheck: skipped'; fi

fuzz: rust tools-fuzz ## libFuzzer on whatever reads bytes from outside, SECONDS=60 for each target (needs a nightly compiler)
	$(call say,fuzz: build$(,) then $(SECONDS) s for each target)
	scripts/fuzz $(SECONDS)

up: ## a RabbitMQ for this computer: the one that runs, a container, or a private node
	$(call say,up: RabbitMQ)
	rabbitmq/up

down: ## stops the RabbitMQ that `make up` started, and no other
	rabbitmq/down

build: rust ## everything, for development
	cargo build --workspace --all-targets

fmt: rust ## formats the sources
	cargo fmt --all

clean: rust ## removes what was built
	cargo clean

# Set-up steps of the commands above.

rust:
	@command -v cargo >/dev/null || { echo 'cargo is missing. Install Rust with rustup, see https://rustup.rs (rust-toolchain.toml says which version).' >&2; exit 1; }

tools-check: rust
	$(call say,set-up: tools)
	scripts/setup-tools check

tools-test: rust
	$(call say,set-up: test runner)
	scripts/setup-tools test

tools-fuzz: rust
	$(call say,set-up: cargo-fuzz)
	scripts/setup-tools fuzz

services:
	$(call say,set-up: RabbitMQ and PostgreSQL for private nodes)
	scripts/setup-services

# A comma inside of $(call say,…).
, := ,
