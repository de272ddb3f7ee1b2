#!/bin/sh
# npm test: sets up what the tests need, runs the checks and every test. `npm test -- PATTERN…` runs only the test
# files whose path contains one of the patterns (and no checks).
set -e
. "$(dirname -- "$0")/node.sh"
varve_setup
cd "$root"

# Debian packages of foreign tools that judge our output: installed where that is possible, else listed.
if command -v dpkg-query >/dev/null 2>&1; then
  missing=
  for package in $(grep -v '^#' test/tools.txt); do
    dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing="$missing $package"
  done
  if [ -n "$missing" ]; then
    sudo=
    [ "$(id -u)" = 0 ] || sudo='sudo -n'
    if command -v apt-get >/dev/null 2>&1 && $sudo true 2>/dev/null; then
      echo "varve: installing the tools that the tests use:$missing" >&2
      log=$(mktemp)
      if ! { $sudo apt-get update && $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $missing; } >"$log" 2>&1; then
        tail -n 20 "$log" >&2
        echo "varve: apt-get could not install all of them; the tests that need them are skipped, with that reason" >&2
      fi
      rm -f "$log"
    else
      echo "varve: not installed, and neither root nor sudo at hand:$missing" >&2
      export VARVE_MISSING_TOOLS="$missing"
    fi
  fi
else
  export VARVE_MISSING_TOOLS="not a Debian-like system; the packages are listed in test/tools.txt"
fi

if [ $# -eq 0 ]; then
  sh scripts/check.sh
fi
exec node scripts/run-tests.ts "$@"
