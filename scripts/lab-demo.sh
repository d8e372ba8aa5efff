#!/usr/bin/env bash
# The demo mesh: starts it, sends traffic, checks what Warren promises about that traffic, leaves it running.
#
#   scripts/lab-demo.sh [NAME]     what `make lab` runs after building
set -euo pipefail
cd "$(dirname "$0")/.."

LAB=${1:-demo}
WARREN=target/release/warren
MARKER=warren-demo-secret-$RANDOM$RANDOM
CAPTURE=$(mktemp --suffix .pcap)
TCPDUMP=
REQUESTS=20
trap '[ -z "$TCPDUMP" ] || kill "$TCPDUMP" 2>/dev/null || true; rm -f "$CAPTURE"' EXIT

main() {
  if [ "$(id -u)" != 0 ]; then
    echo "make lab needs root: it makes network namespaces and rules in them." >&2
    exit 1
  fi
  start
  local node1 node2
  node1=$(lab get nodes -o json | jq -r '.[] | select(.name == "node-1") | .address')
  node2=$(lab get nodes -o json | jq -r '.[] | select(.name == "node-2") | .address')

  say "Traffic: client (node-1) calls http://web/ $REQUESTS times, while the link between the nodes is captured"
  capture_start
  local answers="" i
  for i in $(seq $REQUESTS); do
    answers+=$(in_client curl -sS --max-time 10 "http://web/?$MARKER-$i")$'\n'
  done
  sort <<<"$answers" | uniq -c | grep web
  local remote
  remote=$(grep -c ' on node-2 ' <<<"$answers")
  capture_stop "$remote"

  say "Verified:"
  local client_ip
  client_ip=$(lab get pods -n demo -o json | jq -r '.[] | select(.name == "client") | .ips[0]')
  check "pods on both nodes answered, and all saw the client pod's own address ($client_ip)" \
    all_called_by "$client_ip" "$answers"
  check "their logs have it too" [ "$(web_logs | grep -c "^$client_ip .*$MARKER")" = $REQUESTS ]
  local tunnel others
  tunnel=$(packets "host $node1 and host $node2 and tcp port 15008")
  others=$(packets "tcp and not port 15008 and not port 15012")
  check "on the link: $tunnel packets between the nodes' port 15008" [ "$tunnel" -gt 0 ]
  check "on the link: no other TCP but the controller's (15012)" [ "$others" = 0 ]
  check "the handshake is TLS 1.3" \
    tls13_in "$CAPTURE"
  check "the text of the requests ($MARKER) is nowhere in the capture" \
    absent "$MARKER" "$CAPTURE"
  check "node-1 counted $REQUESTS connections, with both identities and mutual TLS" \
    [ "$(counted node-1 source)" = $REQUESTS ]
  check "node-2 counted its $remote of them" [ "$(counted node-2 destination)" = "$remote" ]
  check "the proxies run as uid $(proxy_field Uid), with capabilities $(proxy_field CapEff), seccomp mode $(proxy_field Seccomp)" \
    unprivileged
  check "a stranger outside the mesh still gets through (mode permissive)" \
    has_line "was called by" lab exec -n outside stranger -- curl -sS --max-time 10 http://web.demo/

  hints
}

start() {
  # A demo that still runs is replaced, so that what is checked is what was just built.
  lab down >/dev/null 2>&1 || true
  say "Starting two nodes, a controller and the pods of deploy/lab/demo.yaml"
  lab up --nodes 2 -f deploy/lab/demo.yaml
  lab get pods
}

lab() {
  local verb=$1
  shift
  "$WARREN" lab "$verb" --name "$LAB" "$@" </dev/null
}

in_client() { lab exec -n demo client -- "$@"; }
say() { printf '\n%s\n' "$*"; }

# check WHAT COMMAND...: prints the line with its outcome; the first failure ends the demo.
check() {
  local what=$1
  shift
  if "$@"; then
    echo "  ok  $what"
  else
    echo "  FAILED  $what" >&2
    echo "The lab is still running; look with: $WARREN lab logs --name $LAB node/node-1" >&2
    exit 1
  fi
}

# has_line PATTERN COMMAND...: output is read whole, so that the command never writes to a closed pipe.
has_line() {
  local pattern=$1 output
  shift
  output=$("$@") && grep -q -- "$pattern" <<<"$output"
}

# The link is node-1's eth0: what leaves the node for another one passes it, and nothing else does.
capture_start() {
  local netns log
  netns=$(lab get nodes -o json | jq -r '.[] | select(.name == "node-1") | .netns')
  log=$(mktemp)
  nsenter --net="$netns" tcpdump -i eth0 --immediate-mode -U -Z root -w "$CAPTURE" 2>"$log" </dev/null &
  TCPDUMP=$!
  until grep -q 'listening on' "$log"; do
    kill -0 "$TCPDUMP" 2>/dev/null || { cat "$log" >&2; exit 1; }
    sleep 0.05
  done
  rm -f "$log"
}

capture_stop() {
  # Each request that crossed is at least a packet each way; what comes after the last one is of no interest.
  for _ in $(seq 100); do
    [ "$(packets 'tcp port 15008')" -lt $((2 * $1)) ] || break
    sleep 0.05
  done
  kill -INT "$TCPDUMP"
  wait "$TCPDUMP" || true
  TCPDUMP=
}

all_called_by() { ! grep -v " was called by $1\$" <<<"$2" | grep -q . && grep -q ' on node-1 ' <<<"$2" && grep -q ' on node-2 ' <<<"$2"; }

web_logs() {
  local pod
  for pod in $(lab get pods -n demo -o json | jq -r '.[] | select(.name | startswith("web-")) | .name'); do
    lab logs -n demo "$pod"
  done
}

# counted NODE REPORTER: requests from client to web that the node's proxy has counted.
counted() {
  lab metrics "$1" | awk -v reporter="reporter=\"$2\"" '
    /^warren_http_requests_total/ && index($0, reporter) && /sa\/client".*sa\/web".*mutual_tls"/ { sum += $NF }
    END { print sum + 0 }'
}

packets() { tcpdump -r "$CAPTURE" "$1" 2>/dev/null | wc -l; }
absent() { ! grep -qaF -- "$1" "$2"; }
# The extension supported_versions of a ServerHello: type 43, length 2, 0x0304.
tls13_in() { tcpdump -r "$1" -w - 'tcp port 15008' 2>/dev/null | LC_ALL=C grep -aP '\x00\x2b\x00\x02\x03\x04' >/dev/null; }

proxy_field() {
  local pid
  for pid in $(lab get nodes -o json | jq -r '.[].proxyPid'); do
    awk -v field="$1:" '$1 == field { print $2 }' "/proc/$pid/status"
  done | sort -u | paste -sd,
}

unprivileged() { [ "$(proxy_field Uid)" != 0 ] && [ "$(proxy_field CapEff)" = 0000000000000000 ] && [ "$(proxy_field Seccomp)" = 2 ]; }

hints() {
  cat <<END

The demo mesh is running. Try:
  W="$WARREN lab"
  \$W get pods --name $LAB
  \$W exec --name $LAB -n demo client -- curl -s http://web/
  \$W restart --name $LAB node/node-2 --proxy --kill     # then curl again: it waits a moment, nothing is refused
  \$W stop --name $LAB controller                        # then curl again: nothing changes; \$W start brings it back
  \$W metrics --name $LAB node-1 | grep http_requests_total
  \$W logs --name $LAB node/node-2 --proxy
Stop it with: make lab-down
END
}

main "$@"
