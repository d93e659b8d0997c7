#!/bin/sh
# Data-parallel training over slow links: a network namespace for each process, all on one switch, every link limited
# to a rate in both directions.
#
#     sudo benchmarks/reduce.sh                                               # every row that reduce.json lacks
#     sudo benchmarks/reduce.sh --models minilm --rates 100 --processes 2     # one row
#
# Options go to reduce.py; PYTHON names the interpreter.  Needs root and iproute2, and leaves nothing behind.
set -u
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
refuse() { echo "reduce.sh: $1" >&2; exit 3; }

[ "$(id -u)" = 0 ] || refuse "network namespaces need root: run it with sudo."
for tool in ip tc taskset; do
    command -v $tool > /dev/null || refuse "'$tool' is missing: install iproute2 (ip, tc) and util-linux (taskset)."
done

space=reduce$$_ jobs=
most=4
cleanup() {
    for job in $jobs; do kill "$job" 2> /dev/null; done
    for rank in switch $(seq 0 $((most - 1))); do ip netns del $space$rank 2> /dev/null; done
}
trap cleanup EXIT
trap 'exit 130' INT TERM HUP

# Rank k has 10.78.0.(k + 1) on 'net'; the other end is port k of a bridge.
ip netns add ${space}switch && ip -n ${space}switch link add bridge type bridge && ip -n ${space}switch link set bridge up ||
    refuse "this system does not let root make network namespaces (a container without CAP_SYS_ADMIN, perhaps)."
for rank in $(seq 0 $((most - 1))); do
    one=$space$rank
    ip netns add $one && ip -n $one link set lo up && ip -n $one link add net type veth peer name port$rank netns ${space}switch &&
        ip -n ${space}switch link set port$rank master bridge && ip -n ${space}switch link set port$rank up &&
        ip -n $one addr add 10.78.0.$((rank + 1))/24 dev net && ip -n $one link set net up || refuse "the links could not be set up."
done

export PYTHONPATH="$here/..${PYTHONPATH:+:$PYTHONPATH}"
rows=$("$python" "$here/reduce.py" rows "$@") || exit $?
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false GLOO_SOCKET_IFNAME=net
export MASTER_ADDR=10.78.0.1 MASTER_PORT=29556
for row in $rows; do # model@rate@processes
    rate=${row#*@} && rate=${rate%@*} && count=${row##*@}
    burst=$((rate * 1250)); [ $burst -ge 32000 ] || burst=32000
    window=$((rate * 12500)); [ $window -le 4194304 ] || window=4194304
    for rank in $(seq 0 $((count - 1))); do
        ip netns exec $space$rank sh -c "echo 4096 16384 $window > /proc/sys/net/ipv4/tcp_wmem"
        tc -n $space$rank qdisc replace dev net root tbf rate "${rate}mbit" burst $burst latency 200ms &&
            tc -n ${space}switch qdisc replace dev port$rank root tbf rate "${rate}mbit" burst $burst latency 200ms ||
            refuse "tc refuses the rate limit (a kernel without the tbf queue, perhaps)."
    done
    for rank in $(seq 0 $((count - 1))); do
        RANK=$rank WORLD_SIZE=$count ip netns exec $space$rank taskset -c $((rank % $(nproc))) \
            "$python" "$here/reduce.py" rank --row "$row" "$@" &
        jobs="$jobs $!"
    done
    for job in $jobs; do wait "$job" || { echo "reduce.sh: $row failed" >&2; exit 1; }; done
    jobs=
done
