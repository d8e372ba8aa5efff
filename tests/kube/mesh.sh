# What the tests of Warren on a cluster share. Sourced, with `here` and `dir` set; `namespace` is where the test's pods are.
#
# Clients write what each request gave to their standard output, one line with the status at its end. It is read from the
# node's disk, so it can be looked at while the API server is away, and after a reboot.

root=$(cd "$here/../.." && pwd)
cache=${WARREN_KUBE_CACHE:-$HOME/.cache/warren-kube}
bin=$cache/bin
state=$root/target/${WARREN_KUBE_NAME:-kube}
export KUBECONFIG=$state/kubeconfig

# warren_installed [HELM OPTION...]: the charts with the images of this tree
warren_installed() {
  "$bin/helm" upgrade --install warren-crds "$root/deploy/charts/warren-crds" --namespace warren-system --create-namespace --wait
  "$bin/helm" upgrade --install warren "$root/deploy/charts/warren" --namespace warren-system --set image.tag=dev --wait --timeout 3m "$@"
}

# new_namespace NAME [LABEL...]: ready for pods
new_namespace() {
  kubectl create namespace "$1" >/dev/null
  [ $# = 1 ] || kubectl label namespace "$@" >/dev/null
  soon kubectl -n "$1" get serviceaccount default
}

# apply FILE: into the test's namespace, with the name of the echo server's image, which the conformance suite's manifests pin
apply() {
  local echo
  echo=$(sed -nE 's/^ +image: (\S+)$/\1/p' "$cache/gateway-api/mesh.yaml" | sort -u)
  sed "s|@ECHO@|$echo|; s|@NAMESPACE@|$namespace|" "$here/manifests/$1" | kubectl apply -f - >/dev/null
}

# enforced N [SELECTOR]: so many of the namespace's running pods are in the mesh with every node's knowledge, and no other is
enforced() {
  diff <(jq -n "$1") <(kubectl -n "$namespace" get pods -l "${2:-}" -o json | jq '[.items[] |
    select(.metadata.deletionTimestamp == null and (.status.phase | IN("Succeeded", "Failed") | not)) |
    .metadata.annotations["warren-mesh.io/enrolled"] // "{}" | fromjson | select((.phase // "withdrawn") != "withdrawn") |
    if .phase == "enforced" then 1 else error("on its way: \(.phase)") end] | add // 0')
}

# no_failures [COMMAND...]: no request of a client failed since it was looked at last; each made twenty or more.
# COMMAND is given the failed ones and may find them good.
no_failures() {
  local name bad=0
  for name in $(clients); do
    touch "$dir/$name.seen"
    soon twenty_more "$name"
    if grep -v ' 200$' "$dir/$name.new" >"$dir/$name.failed"; then
      echo "$name: $(wc -l <"$dir/$name.failed") of $(wc -l <"$dir/$name.new") requests failed"
      head -20 "$dir/$name.failed"
      [ $# -gt 0 ] && "$@" "$dir/$name.failed" || bad=1
    fi
    mv "$dir/$name.log" "$dir/$name.seen"
  done
  return $bad
}

twenty_more() {
  client_log "$1" >"$dir/$1.log"
  tail -n "+$(($(wc -l <"$dir/$1.seen") + 1))" "$dir/$1.log" >"$dir/$1.new"
  [ "$(wc -l <"$dir/$1.new")" -ge 20 ]
}

# The client's containers, as NODE.CONTAINER. There is one client on each node.
clients() { printf '%s\n' {node-1,node-2}.{fresh,kept}; }

# The whole lines of all logs that the container left on its node, oldest first, each with its time.
client_log() {
  "$here/cluster" exec "${1%%.*}" sh -c 'cat $(ls -tr /var/log/pods/"$1"_client-*/"$2"/*.log)' sh "$namespace" "${1#*.}" |
    sed -nE 's/^(\S+) stdout F /\1 /p'
}

# asked N: each client made so many more requests, whatever they gave
asked() {
  local name
  declare -A before
  for name in $(clients); do before[$name]=$(client_log "$name" | wc -l); done
  for name in $(clients); do soon longer "$name" $((before[$name] + $1)); done
}

longer() { [ "$(client_log "$1" | wc -l)" -ge "$2" ]; }

# without_leaks COMMAND...: fails if it fails, or if a request crosses the link between the nodes in the clear meanwhile
without_leaks() {
  listening "$@"
  not in_the_clear
}

# Requests of the clients cross the link between the nodes in the clear, or in tunnels and not in the clear.
leaks() { listening asked 20 && in_the_clear; }
tunnelled() { without_leaks asked 20 && tcpdump -nr "$dir/wire" -c 1 port 15008 | grep 15008; }

# listening COMMAND...: keeps what crosses the link meanwhile. The control plane's bridge stays when nodes are rebooted.
listening() {
  local dump status=0
  nsenter -t "$(<"$state/machines/control-plane/pid")" --net -- \
    tcpdump -Uni lan -s 0 -w "$dir/wire" "tcp and not port 6443" 2>"$dir/tcpdump" &
  dump=$!
  soon grep -q listening "$dir/tcpdump"
  ("$@") & # as in `expect`
  wait $! || status=$?
  kill $dump
  wait $dump || true
  return $status
}

in_the_clear() {
  grep -aq in-the-clear "$dir/wire" || return 1
  echo "crossed the wire in the clear:"
  tcpdump -nr "$dir/wire" -A 2>/dev/null | grep -a -B 12 in-the-clear | head -30 || true # head goes first
}

not() { ! "$@"; }

# pid_of NODE SELECTOR CONTAINER: the first process of a container of Warren's, as the node counts
pid_of() {
  local id
  id=$(kubectl -n warren-system get pods -l "$2" --field-selector "spec.nodeName=$1" \
    -o jsonpath="{.items[0].status.containerStatuses[?(@.name=='$3')].containerID}")
  "$here/cluster" exec "$1" ctr -n k8s.io task ls | awk -v id="${id#containerd://}" '$1 == id { print $2 }'
}

# restarted DEPLOYMENT-OR-DAEMONSET...: one after the other, each to its end
restarted() {
  local what
  for what in "$@"; do
    kubectl -n warren-system rollout restart "$what"
    kubectl -n warren-system rollout status "$what" --timeout=120s
  done
}

kubectl() { "$bin/kubectl" "$@"; }
