#!/bin/sh
# npm run check: types, lint, format, architecture, in seconds.
set -e
. "$(dirname -- "$0")/node.sh"
varve_setup
cd "$root"
tsc --noEmit
oxlint --type-aware --deny-warnings
biome check --error-on-warnings .
node --test --test-reporter=dot test/architecture.test.ts
