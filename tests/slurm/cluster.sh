#!/usr/bin/env bash
# A real, throw-away SLURM cluster on one machine: every node is a set of Linux namespaces (network, host name,
# mounts, processes) with its own address and slurmd, so that killing or cutting off a node is what it is elsewhere.
#
#   cluster.sh check                    exit 0, or 77 and the reason on stderr
#   cluster.sh start BASE NODES         BASE/bin has the client commands, BASE/slurm.conf the configuration
#   cluster.sh stop BASE
#   cluster.sh kill-node BASE nodeN                power off
#   cluster.sh kill-slurmd BASE nodeN              the daemon dies, what it started lives on
#   cluster.sh cut-node BASE nodeN                 pull the cable
#   cluster.sh hide BASE nodeN FOLDER              the node sees an empty folder of its own in its place
#   cluster.sh show BASE nodeN FOLDER              and the shared one again
#   cluster.sh repair BASE                         all nodes as they were; waits until they are idle
#   cluster.sh reconfigure BASE GRACE PARAMETERS   GraceTime of the low partition, SlurmctldParameters
#
# Everything lives under BASE, with its own munge key; /etc is not touched. With OWNER=PID the cluster stops by
# itself when that process is gone.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin
SUBNET=10.77.0 # exists in the cluster's namespaces only
CPUS=4 MEMORY=4000 GPUS=2

die() { echo "cluster: $*" >&2; exit 1; }

check() {
  local need
  for need in slurmctld:slurmctld slurmd:slurmd sbatch:slurm-client munged:munge ip:iproute2 unshare:util-linux; do
    command -v "${need%%:*}" >/dev/null || { echo "${need%%:*} is missing (Debian package ${need##*:})" >&2; exit 77; }
  done
  unshare --net --uts --mount --pid --fork true 2>/dev/null ||
    { echo "no right to make namespaces (run as root)" >&2; exit 77; }
}

# a zombie that nobody reaps is gone too
alive() { local state; state=$(sed 's/.*) //' "/proc/$1/stat" 2>/dev/null) && [ -n "$state" ] && [ "${state%% *}" != Z ]; }

wait_gone() {
  for _ in $(seq 100); do alive "$1" || return 0; sleep 0.05; done
  kill -9 "$1" 2>/dev/null || true
}

# ---- hosts: one bash is the init of each; when it dies, so does all that it holds -------------------------------
boot() { # name
  local name=$1 unshared
  setsid unshare --net --uts --mount --pid --fork --kill-child --mount-proc -- bash -c '
    hostname "$1"; ip link set lo up
    mount --bind "$2/hosts" /etc/hosts; mount --bind "$2/nsswitch.conf" /etc/nsswitch.conf
    mkdir -p "$2/tmp/$1"; : >"$2/run/$1.booted"
    trap : TERM HUP INT USR1; while :; do sleep 3600 & wait $! || true; done' init "$name" "$BASE" \
    </dev/null >"$BASE/log/init.$name" 2>&1 &
  unshared=$!
  for _ in $(seq 500); do [ -e "$BASE/run/$name.booted" ] && break; sleep 0.02; done
  rm "$BASE/run/$name.booted" || die "$name did not boot: $(cat "$BASE/log/init.$name")"
  tr -d ' ' <"/proc/$unshared/task/$unshared/children" >"$BASE/run/$name.init"
}

power_off() { # name
  local init
  [ -s "$BASE/run/$1.init" ] || return 0
  init=$(cat "$BASE/run/$1.init")
  kill -9 "$init" 2>/dev/null || true
  wait_gone "$init"
  rm -f "$BASE/run/$1.init"
}

inside() { local name=$1; shift; nsenter -t "$(cat "$BASE/run/$name.init")" -n -u -m -p -- "$@"; }

wire() { # name, number: one end of a cable in the node, the other on a bridge in the controller
  local name=$1 number=$2 controller
  controller=$(cat "$BASE/run/ctl.init")
  nsenter -t "$controller" -n ip link del "v$number" 2>/dev/null || true
  nsenter -t "$controller" -n ip link add "v$number" type veth peer name eth0 netns "$(cat "$BASE/run/$name.init")"
  nsenter -t "$controller" -n ip link set "v$number" master br0 up
  inside "$name" ip addr add "$SUBNET.$((10 + number))/24" dev eth0
  inside "$name" ip link set eth0 up
}

slurmd_of() { # its process as seen from here; pid files hold what it is inside
  local space init
  init=$(cat "$BASE/run/$1.init" 2>/dev/null) || return 1
  space=$(readlink "/proc/$init/ns/pid")
  for process in /proc/[0-9]*; do
    [ "$(readlink "$process/ns/pid" 2>/dev/null)" = "$space" ] || continue
    [ "$(tr '\0' ' ' <"$process/cmdline" 2>/dev/null)" = "slurmd -N $1 " ] && { echo "${process#/proc/}"; return; }
  done
  return 1
}

# ---- SLURM ------------------------------------------------------------------------------------------------------
write_configuration() { # grace, slurmctld's parameters
  cat >"$BASE/slurm.conf" <<CONF
ClusterName=throwaway
SlurmctldHost=ctl($SUBNET.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a requeued job waits before it may start again (120 s if left out)
AuthInfo=socket=$BASE/munge/socket,cred_expire=5
StateSaveLocation=$BASE/state
# nodes share the file system
SlurmdSpoolDir=$BASE/spool/%n
TmpFS=$BASE/tmp/%n
SlurmctldPidFile=$BASE/run/slurmctld.pid
SlurmdPidFile=$BASE/run/slurmd.%n.pid
SlurmctldLogFile=$BASE/log/slurmctld
SlurmdLogFile=$BASE/log/slurmd.%n
# no cgroups
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=1,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
${2:+SlurmctldParameters=$2}
JobRequeue=1
# failures are noticed in seconds, where a cluster takes minutes
KillWait=5
SlurmctldTimeout=10
SlurmdTimeout=6
MessageTimeout=5
TCPTimeout=2
InactiveLimit=0
EnforcePartLimits=ALL
MinJobAge=300
UnkillableStepTimeout=30
GresTypes=gpu
PartitionName=low  Nodes=node[1-$NODES] Default=YES MaxTime=60 DefaultTime=10 PriorityTier=1 PreemptMode=REQUEUE GraceTime=$1
PartitionName=spot Nodes=node[1-$NODES] MaxTime=60 DefaultTime=10 PriorityTier=1 PreemptMode=CANCEL
PartitionName=high Nodes=node[1-$NODES] MaxTime=60 DefaultTime=10 PriorityTier=10 PreemptMode=OFF
CONF
  for number in $(seq "$NODES"); do
    echo "NodeName=node$number NodeAddr=$SUBNET.$((10 + number)) Port=6818 CPUs=$CPUS RealMemory=$MEMORY Gres=gpu:$GPUS"
  done >>"$BASE/slurm.conf"
  echo "NodeName=node[1-$NODES] Name=gpu File=$BASE/gpu[0-$((GPUS - 1))]" >"$BASE/gres.conf"
  printf 'CgroupAutomount=no\nCgroupPlugin=cgroup/v1\n' >"$BASE/cgroup.conf"
}

write_commands() { # the clients run in the controller's network, and in a job where they are
  local real
  for command in sbatch srun salloc scontrol squeue sinfo scancel; do
    real=$(command -v "$command")
    cat >"$BASE/bin/$command" <<SH
#!/bin/sh
export SLURM_CONF='$BASE/slurm.conf'
[ -n "\$SLURM_JOB_ID" ] && exec $real "\$@"
exec nsenter -t "\$(cat '$BASE/run/ctl.init')" -n -u -m -- $real "\$@"
SH
    chmod +x "$BASE/bin/$command"
  done
}

start_node() { # name
  mkdir -p "$BASE/spool/$1"
  if ! [ -s "$BASE/run/$1.init" ] || ! alive "$(cat "$BASE/run/$1.init")"; then
    boot "$1"
    wire "$1" "${1#node}"
  fi
  inside "$1" env SLURM_CONF="$BASE/slurm.conf" slurmd -N "$1"
}

start() {
  check
  mkdir -p "$1"/{run,log,state,spool,tmp,munge,bin}
  BASE=$(readlink -f "$1") NODES=$2
  echo "$NODES" >"$BASE/run/nodes"
  chmod 755 "$BASE" "$BASE/munge"
  trap 'stop >/dev/null 2>&1' ERR
  echo "127.0.0.1 localhost" >"$BASE/hosts"
  echo "$SUBNET.1 ctl" >>"$BASE/hosts"
  for number in $(seq "$NODES"); do echo "$SUBNET.$((10 + number)) node$number"; done >>"$BASE/hosts"
  sed 's/^hosts:.*/hosts: files/' /etc/nsswitch.conf >"$BASE/nsswitch.conf"
  # SLURM wants device files for GPUs; these are /dev/null by another name
  for gpu in $(seq 0 $((GPUS - 1))); do mknod "$BASE/gpu$gpu" c 1 3; done
  write_configuration 0 ""
  write_commands
  (umask 077; head -c 128 /dev/urandom >"$BASE/munge/key")
  munged --key-file="$BASE/munge/key" --socket="$BASE/munge/socket" --pid-file="$BASE/munge/pid" \
    --log-file="$BASE/munge/log" --seed-file="$BASE/munge/seed" --num-threads=4
  boot ctl
  inside ctl ip link add br0 type bridge
  inside ctl ip addr add "$SUBNET.1/24" dev br0
  inside ctl ip link set br0 up
  inside ctl env SLURM_CONF="$BASE/slurm.conf" slurmctld
  for number in $(seq "$NODES"); do start_node "node$number"; done
  wait_idle
  if [ -n "${OWNER:-}" ]; then
    setsid bash -c 'while kill -0 "$1" 2>/dev/null && [ -e "$3/run/nodes" ]; do sleep 1; done; bash "$2" stop "$3"' \
      watch "$OWNER" "$(readlink -f "$0")" "$BASE" </dev/null >/dev/null 2>&1 &
  fi
}

repair() {
  local name
  for number in $(seq "$NODES"); do
    name=node$number
    [ -s "$BASE/run/$name.init" ] && inside ctl ip link set "v$number" up
    slurmd_of "$name" >/dev/null 2>&1 || start_node "$name"
  done
  wait_idle
}

wait_idle() {
  for _ in $(seq 300); do
    [ "$("$BASE/bin/sinfo" -h -N -p low -o %T 2>/dev/null | grep -c '^idle$')" = "$NODES" ] && return 0
    sleep 0.1
  done
  tail -20 "$BASE/log/slurmctld" >&2
  return 1
}

stop() {
  [ -e "$BASE/run/nodes" ] || return 0
  for number in $(seq "$NODES"); do power_off "node$number"; done
  power_off ctl
  if [ -s "$BASE/munge/pid" ]; then
    kill "$(cat "$BASE/munge/pid")" 2>/dev/null || true
    wait_gone "$(cat "$BASE/munge/pid")"
  fi
  rm -f "$BASE/run/nodes"
}

verb=${1:-}
case $verb in
  check) check; exit ;;
  start) start "$2" "$3"; exit ;;
esac
BASE=$(readlink -f "${2:?which cluster?}")
[ -e "$BASE/run/nodes" ] || die "no cluster in $BASE"
NODES=$(cat "$BASE/run/nodes")
case $verb in
  stop) stop ;;
  kill-node) power_off "$3" ;;
  kill-slurmd) kill -9 "$(slurmd_of "$3")" ;;
  cut-node) inside ctl ip link set "v${3#node}" down ;;
  hide) inside "$3" mount -t tmpfs none "$4" ;;
  show) inside "$3" umount "$4" ;;
  repair) repair ;;
  reconfigure) write_configuration "$3" "$4"; "$BASE/bin/scontrol" reconfigure ;;
  *) die "unknown verb $verb" ;;
esac
