#!/bin/sh
# What the boot scripts of a host without systemd do, as far as the lab needs it; at last Open vSwitch's own.
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t tmpfs -o mode=755 tmpfs /run
mkdir -p /run/lock /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
hostname lab
ip link set lo up
# count_cpu_cores of OVS 3.1 answers 0 in the first 10 s after boot (see src/guest/mod.rs).
while read -r up _ </proc/uptime && [ "${up%%.*}" -lt 12 ]; do sleep 0.2; done
/etc/init.d/openvswitch-switch start
