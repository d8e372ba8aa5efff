# Machines of the test cluster: namespaces, cables and cgroups. Sourced by `cluster`.
#
# The control plane's network has a bridge, `lan`, to which every node and this host are plugged in.

machine_up() {
  local dir=$machines/$1 fd
  mkdir -p "$dir"/{services,log,run,disk}
  mkfifo "$dir/start"
  (
    # It outlives the caller, whose locks and pipes it must not hold.
    for fd in /proc/self/fd/*; do
      fd=${fd##*/}
      if ((fd > 2)); then eval "exec $fd>&-"; fi
    done
    enter_cgroup "$1"
    exec setsid unshare --net --mount --pid --fork --ipc --uts --cgroup -- "$here/machine-init" "$dir" "$1"
  ) </dev/null >>"$dir/log/machine.log" 2>&1 &
  wait_for "machine $1 (see $dir/log/machine.log)" 10 test -s "$dir/pid"
  if [ "$1" = control-plane ]; then lan_up; else plug_in "$1"; fi
  routes
}

lan_up() {
  local node
  # With a hardware address of its own; otherwise it takes a port's, and another one when ports come and go.
  on control-plane ip link add lan address 02:00:00:00:00:10 type bridge
  on control-plane ip address add "$api/24" dev lan
  on control-plane ip link set lan up
  ip link del "$prefix" 2>/dev/null || true # left by a control plane that was rebooted; so are the nodes' ends
  ip link add "$prefix" type veth peer name host netns "$(pid control-plane)"
  ip address add "$net.0.1/24" dev "$prefix"
  ip link set "$prefix" up
  on control-plane ip link set host master lan up
  for node in $(nodes); do plug_in "$node"; done
}

plug_in() {
  on "$1" ip link del eth0 2>/dev/null || true
  on control-plane ip link del "$1" 2>/dev/null || true
  on control-plane ip link add "$1" type veth peer name eth0 netns "$(pid "$1")"
  on control-plane ip link set "$1" master lan up
  on "$1" ip address add "$(address "$1")/24" dev eth0
  on "$1" ip link set eth0 up
}

# Everyone knows the way to the pods of each node. The default route leads nowhere, but a packet for a Service needs
# a route before it is redirected.
routes() {
  local from to
  for to in $(nodes); do
    ip route replace "$(pods "$to")" via "$(address "$to")"
    on control-plane ip route replace "$(pods "$to")" via "$(address "$to")"
  done
  for from in $(nodes); do
    on "$from" ip route replace default via "$net.0.1"
    for to in $(nodes); do
      [ "$from" = "$to" ] || on "$from" ip route replace "$(pods "$to")" via "$(address "$to")"
    done
  done
}

nodes() {
  local file
  for file in "$machines"/node-*/pid; do [ ! -s "$file" ] || basename "$(dirname "$file")"; done
}

pid() {
  [ -s "$machines/$1/pid" ] || die "no machine $1"
  cat "$machines/$1/pid"
}

address() { echo "$net.0.$((10 + ${1#node-}))"; }
pods() { echo "$net.${1#node-}.0/24"; }

# on MACHINE COMMAND...: in the machine's network, but with this host's files and processes
on() {
  local pid
  pid=$(pid "$1")
  shift
  nsenter -t "$pid" --net -- "$@"
}

# --- cgroups ---

hierarchies=$(findmnt -nr -t cgroup,cgroup2 -o TARGET)

# Puts this process into the machine's cgroup in each hierarchy; the machine's cgroup namespace shows that as the root.
enter_cgroup() {
  local path part item
  for path in $hierarchies; do
    for part in "$prefix" "$1"; do
      mkdir -p "$path/$part"
      if [ -e "$path/cgroup.subtree_control" ]; then # v2: controllers are handed down
        for item in $(<"$path/cgroup.controllers"); do echo "+$item" >"$path/cgroup.subtree_control"; done
      elif [ -e "$path/cpuset.cpus" ]; then # v1: a new cpuset is empty and takes no process
        for item in cpuset.cpus cpuset.mems; do cat "$path/$item" >"$path/$part/$item"; done
      fi
      path+=/$part
    done
    echo "$BASHPID" >"$path/cgroup.procs"
  done
}

# Kills all that runs in these cgroups, and removes them. Mounts and networks of a machine go with its last process.
kill_machines() {
  local cgroup
  for cgroup in "$@"; do wait_for "the processes in $cgroup to end" 60 no_processes "$cgroup"; done
  for cgroup in "$@"; do wait_for "the cgroup $cgroup to be removed" 30 no_cgroup "$cgroup"; done
}

no_processes() {
  local path pids
  pids=$(for path in $hierarchies; do find "$path/$1" -name cgroup.procs -exec cat {} + 2>/dev/null; done | sort -u)
  [ -n "$pids" ] || return 0
  kill -KILL $pids
  return 1
}

no_cgroup() {
  local path
  for path in $hierarchies; do
    [ ! -d "$path/$1" ] || find "$path/$1" -depth -type d -exec rmdir {} + || return 1
  done
}
