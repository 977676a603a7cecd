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
# What becomes of the restart is told at the end. Where our package is in the same upgrade, its file triggers may have been
# satisfied by its own configuration before.
# In parentheses: the init script has no link in this runlevel.
case "$DPKG_MAINTSCRIPT_NAME $2" in
"postinst restart" | "postinst (restart)")
	dpkg-trigger --no-await --by-package=ovs-graceful ovs-graceful-upgraded 2>/dev/null || true
	;;
esac
/usr/sbin/ovs-graceful hook policy "$1" "$2"
# What it says by accident is no policy.
test $? != 101 || exit 101
