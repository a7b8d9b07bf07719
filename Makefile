# Shorter names for bin/; nothing happens here that a checkout without make could not do.

.PHONY: help demo test fast chaos bench lint audit lock k8s-cluster clean

help: ## show this
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1\t/p' Makefile

demo: ## run the main job on an embedded Postgres, or on the server of DATABASE_URL
	bin/demo

test: ## install all that the tests need and pass them
	bin/test

fast: ## the tests that need no server, no container engine and no other project
	bin/test -n auto -m "not server and not engine and not histories"

chaos: ## an hour of killed, cut and restarted runs (SECONDS=600 for ten minutes)
	bin/setup
	.venv/bin/python -m tests.chaos --seconds $(or $(SECONDS),3600)

bench: ## compare with plain Alembic, native tools and pg_dump: runs in turn, medians, ratios, in bench/results/
	bin/setup
	.venv/bin/python -m bench.compare
	.venv/bin/python -m bench.applications
	.venv/bin/python -m bench.race
	.venv/bin/python -m bench.backup
	.venv/bin/python -m bench.restore
	.venv/bin/python -m bench.container
	.venv/bin/python -m bench.sidecar
	.venv/bin/python -m bench.memory
	.venv/bin/python -m bench.growth

k8s-cluster: ## build Kubernetes from its Go modules, run it here, and run the manifests on it (as root, not in CI)
	bin/k8s-cluster

lint: ## fix what ruff can fix
	bin/setup
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

audit: ## ask whether a locked dependency has a known vulnerability
	bin/setup
	bin/audit

lock: ## write both lock files
	bin/lock
	bin/lock-dev

clean: ## delete what bin/setup and the tests made
	rm -rf .venv .cache
