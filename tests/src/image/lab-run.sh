#!/bin/sh
# Unpacks the input disk, runs the guest agent in it, writes /out to the output disk, switches off.
mkdir -p /lab /out
tar xf /dev/vdb -C /lab
sysctl -qw kernel.printk=1
/lab/lab guest agent /lab/job.json /out
echo "$?" >/out/agent-exit
tar cf /dev/vdc -C /out .
sync
echo o >/proc/sysrq-trigger
sleep 10
