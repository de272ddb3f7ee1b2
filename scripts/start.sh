#!/bin/sh
# npm start: without arguments the example (scripts/example.ts), else `varve ARGUMENTS`.
set -e
. "$(dirname -- "$0")/node.sh"
varve_setup
if [ $# -eq 0 ]; then
  exec node "$root/scripts/example.ts"
fi
# npm runs scripts in the package's folder; paths in the arguments are relative to where the person stands.
if [ -n "${INIT_CWD:-}" ] && [ -d "$INIT_CWD" ]; then cd -- "$INIT_CWD"; fi
exec "$root/bin/varve" "$@"
