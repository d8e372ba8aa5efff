#!/usr/bin/env bash
# The programs as container images have them: target/dist/. The node proxy is compiled with a profile of itself under
# load (profile-guided optimization), which takes 8 to 15 % of its processor time for an HTTP request away.
#
#   scripts/build-dist.sh            (root: the load runs in the lab; some 25 minutes the first time on two cores)
#   PROFILE=none scripts/build-dist.sh        without a profile, and without root
#
# The profile is made anew when the proxy's sources, its dependencies or the compiler have changed. It is of the compiler's
# version: target/pgo/node-proxy-VERSION.profdata, where deploy/containers/node-proxy.Containerfile looks for it.
set -euo pipefail
cd "$(dirname "$0")/.."
export CARGO_INCREMENTAL=0
target=$(realpath -m "${CARGO_TARGET_DIR:-target}")
pgo=$target/pgo
version=$(rustc --version | cut -d' ' -f2)
profile=$pgo/node-proxy-$version.profdata
# The proxies write there as the user that they run as, each in a directory of its own (%p): one that is killed while it
# writes must not spoil what the others have written.
raw=/run/warren/profile
# All that is asked of a proxy, for a second each.
load=(--arms "warren,warren-same-node" --cases "bulk,bulk-down,requests,open,connect,http1,http2,grpc" --seconds 1 --repetitions 1)

main() {
  cargo build --profile dist -p warren -p warren-cni -p warren-controller -p warren-benches
  if [ "${PROFILE:-}" = none ]; then
    cargo build --profile dist -p warren-node-proxy
    return
  fi
  local sources
  sources=$(sources)
  if [ ! -e "$profile" ] || [ "$(cat "$profile.of" 2>/dev/null)" != "$sources" ]; then
    make_profile
    echo "$sources" >"$profile.of"
  fi
  echo "the node proxy, with $profile"
  proxy use "-Cprofile-use=$profile"
  install "$pgo/use/dist/warren-node-proxy" "$target/dist/"
}

# What a profile is of.
sources() {
  {
    rustc -vV
    echo "${RUSTFLAGS:-}"
    cat scripts/build-dist.sh Cargo.toml Cargo.lock
    find node-proxy mesh-api -type f \( -name '*.rs' -o -name '*.proto' -o -name Cargo.toml \) ! -name tests.rs -print0 |
      LC_ALL=C sort -z | xargs -0 cat
  } | sha256sum | cut -d' ' -f1
}

# proxy DIRECTORY FLAG
proxy() {
  RUSTFLAGS="${RUSTFLAGS:-} $2" cargo build --profile dist -p warren-node-proxy --target-dir "$pgo/$1"
}

make_profile() {
  local merge program
  merge=$(rustc --print sysroot)/lib/rustlib/$(rustc -vV | sed -n 's/^host: //p')/bin/llvm-profdata
  if [ ! -x "$merge" ]; then
    echo "$merge is missing: rustup component add llvm-tools (or PROFILE=none $0, for a slower proxy)" >&2
    exit 1
  fi
  if [ "$(id -u)" != 0 ]; then
    echo "the profile needs root: its load runs in network namespaces (or PROFILE=none $0, for a slower proxy)" >&2
    exit 1
  fi
  echo "the node proxy that counts what it does, for the profile"
  proxy count "-Cprofile-generate=$raw/%p"
  mkdir -p "$pgo/programs"
  for program in warren warren-cni warren-controller warren-bench; do
    ln -f "$target/dist/$program" "$pgo/programs/"
  done
  ln -f "$pgo/count/dist/warren-node-proxy" "$pgo/programs/"
  # One load at a time, of whatever checkout.
  mkdir -p "$(dirname "$raw")"
  exec 9>"$raw.lock"
  flock 9
  rm -rf "$raw"
  install -d -m 1777 "$raw"
  trap 'rm -rf "$raw"' EXIT
  echo "its load"
  "$pgo/programs/warren-bench" run "${load[@]}" --output "$pgo/load.json" 9>&-
  "$merge" merge --failure-mode=all -o "$profile" "$raw"
  # A profile in which nothing was done would make the data path slow.
  local half calls
  for half in caller:4wire4seal callee:4wire4open; do
    calls=$("$merge" show --counts --function="${half#*:}" "$profile" |
      sed -n 's/^ *Block counts: \[\(.*\)\]/\1/p' | tr -d ' ' | tr ',' '\n' | sort -n | tail -1)
    if [ "${calls:-0}" -lt 100000 ]; then
      rm -f "$profile"
      echo "the profile has ${calls:-no} requests of a ${half%:*}'s proxy: can user 65532 write to $raw?" >&2
      exit 1
    fi
  done
  rm -rf "$raw"
  trap - EXIT
  exec 9>&-
}

main "$@"
