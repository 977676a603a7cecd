#!/bin/busybox sh
# init of the lab's initramfs: the virtio disk drivers in the order they need each other, then the real root and
# its first process, which `init=` may name.
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox mount -t sysfs sysfs /sys
for m in virtio_ring virtio virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci virtio_blk; do
	[ -f /mod/$m.ko ] && /bin/busybox insmod /mod/$m.ko
done
i=0
while [ ! -b /dev/vda ] && [ $i -lt 200 ]; do /bin/busybox sleep 0.05; i=$((i + 1)); done
/bin/busybox mount -t ext4 /dev/vda /root
/bin/busybox mount --move /dev /root/dev
init=/sbin/init
for word in $(/bin/busybox cat /proc/cmdline); do
	case $word in init=*) init=${word#init=} ;; esac
done
/bin/busybox umount /proc
/bin/busybox umount /sys
exec /bin/busybox switch_root /root "$init"
