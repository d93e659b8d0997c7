#!/bin/sh
# Pipeline training over slow links: a network namespace for each stage, a veth pair with a rate limit between
# neighbours, one process on one core in each.
#
#     sudo benchmarks/slow_link.sh                                   # every row that slow_link.json lacks
#     sudo benchmarks/slow_link.sh --models minilm --rates 100       # one row
#
# Options go to slow_link.py; PYTHON names the interpreter.  Needs root and iproute2, and leaves nothing behind.
# The rate is limited in both directions; delay is that of a queue, no more.
set -u
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
refuse() { echo "slow_link.sh: $1" >&2; exit 3; }

[ "$(id -u)" = 0 ] || refuse "network namespaces need root: run it with sudo."
for tool in ip tc taskset; do
    command -v $tool > /dev/null || refuse "'$tool' is missing: install iproute2 (ip, tc) and util-linux (taskset)."
done

stages=2 previous=
for word in "$@"; do
    [ "$previous" = --stages ] && stages=$word
    previous=$word
done
last=$((stages - 1)) ranks=$(seq 0 $((stages - 1))) space=slowlink$$_ jobs=

cleanup() {
    for job in $jobs; do kill "$job" 2> /dev/null; done
    for rank in $ranks; do ip netns del $space$rank 2> /dev/null; done
}
trap cleanup EXIT
trap 'exit 130' INT TERM HUP

# Rank k has 10.77.k.1 on 'next', to the next stage, and 10.77.(k-1).2 on 'prev', from the one before.
for rank in $ranks; do
    ip netns add $space$rank && ip -n $space$rank link set lo up ||
        refuse "this system does not let root make network namespaces (a container without CAP_SYS_ADMIN, perhaps)."
done
for rank in $ranks; do
    [ "$rank" = $last ] && break
    here_=$space$rank there=$space$((rank + 1))
    ip -n $here_ link add next type veth peer name prev netns $there &&
        ip -n $here_ addr add 10.77.$rank.1/24 dev next && ip -n $there addr add 10.77.$rank.2/24 dev prev &&
        ip -n $here_ link set dev next up && ip -n $there link set dev prev up || refuse "the link could not be set up."
done
for rank in $ranks; do  # all can reach all, through those between
    [ "$rank" -lt $((last - 1)) ] && ip -n $space$rank route add 10.77.$((rank + 1)).0/24 via 10.77.$rank.2
    [ "$rank" -gt 1 ] && ip -n $space$rank route add 10.77.$((rank - 2)).0/24 via 10.77.$((rank - 1)).1
    [ $stages -gt 2 ] && ip netns exec $space$rank sh -c 'echo 1 > /proc/sys/net/ipv4/ip_forward'
done

export PYTHONPATH="$here/..${PYTHONPATH:+:$PYTHONPATH}"
rows=$("$python" "$here/slow_link.py" rows "$@") || exit $?
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export MASTER_ADDR=10.77.0.1 MASTER_PORT=29555 WORLD_SIZE=$stages
for row in $rows; do
    rate=${row##*@}
    # Ten milliseconds of burst: a timer tick must not starve a fast link, nor a burst carry a slow one.
    burst=$((rate * 1250)); [ $burst -ge 32000 ] || burst=32000
    # A sender has no more under way than half of what the queue holds, so nothing is dropped and sent again.
    window=$((rate * 12500)); [ $window -le 4194304 ] || window=4194304
    for rank in $ranks; do
        ip netns exec $space$rank sh -c "echo 4096 16384 $window > /proc/sys/net/ipv4/tcp_wmem"
        for side in prev next; do
            [ $side$rank = prev0 ] || [ $side$rank = next$last ] ||
                tc -n $space$rank qdisc replace dev $side root tbf rate "${rate}mbit" burst $burst latency 200ms ||
                refuse "tc refuses the rate limit (a kernel without the tbf queue, perhaps)."
        done
    done
    for rank in $ranks; do
        side=prev; [ "$rank" = 0 ] && side=next
        RANK=$rank GLOO_SOCKET_IFNAME=$side ip netns exec $space$rank taskset -c $((rank % $(nproc))) \
            "$python" "$here/slow_link.py" rank --row "$row" "$@" &
        jobs="$jobs $!"
    done
    for job in $jobs; do wait "$job" || { echo "slow_link.sh: $row failed" >&2; exit 1; }; done
    jobs=
done
