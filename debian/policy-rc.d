#!/bin/sh
# /usr/sbin/policy-rc.d by way of update-alternatives (README.policy-rc.d of init-system-helpers): has a say in what the
# maintainer scripts of Open vSwitch do to its daemons, and allows everything else.
test "$DPKG_MAINTSCRIPT_PACKAGE" = openvswitch-switch || exit 0
for word; do
	case $word in
	--list) exit 0 ;;
	--*) shift ;;
	*) break ;;
	esac
done
test -x /usr/sbin/ovs-graceful || exit 0
/usr/sbin/ovs-graceful hook policy "$1" "$2"
# What it says by accident is no policy.
test $? != 101 || exit 101
