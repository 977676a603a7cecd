#!/bin/sh
# Unpacks the input disk, runs the guest agent in it, writes /out to the output disk, switches off.
# Where the input disk is empty it brings the guest to where every run begins, says so, and waits for an input: the
# lab keeps the machine as it is then (src/warm.rs), and every run goes on from there.
input_is_there() { dd if=/dev/vdb bs=512 count=1 iflag=direct 2>/dev/null | grep -aq ustar; }

mkdir -p /lab /out
sysctl -qw kernel.printk=1
if ! input_is_there; then
	while systemctl is-system-running | grep -q -e initializing -e starting; do sleep 0.2; done
	# count_cpu_cores of OVS 3.1 answers 0 in the first 10 s after boot (see src/guest/mod.rs).
	while read -r up _ </proc/uptime && [ "${up%%.*}" -lt 11 ]; do sleep 0.2; done
	systemctl restart openvswitch-switch
	until timeout 5 ovs-vsctl show >/dev/null 2>&1; do sleep 0.2; done
	sync
	echo "lab: warm"
	until input_is_there; do sleep 0.1; done
fi
# The page cache remembers the empty disk.
blockdev --flushbufs /dev/vdb
tar xmf /dev/vdb -C /lab
/lab/lab guest agent /lab/job.json /out
echo "$?" >/out/agent-exit
tar cf /dev/vdc -C /out .
sync
echo o >/proc/sysrq-trigger
sleep 10
