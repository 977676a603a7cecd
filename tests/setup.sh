# Sourced by tests/demo, tests/all and .ci/run: installs what is missing, through apt alone.
#
# Sets CARGO. Leaves alone what the machine has and is new enough.

wanted_cargo=89 # rust-version of the workspace: 1.89

say() { echo "setup: $*" >&2; }

apt_updated=no

# Old lists know of old packages (a rustc-web that is too old, versions that the mirror no longer has).
apt_update() {
	[ "$apt_updated" = yes ] || apt-get update -q >&2
	apt_updated=yes
}

apt_install() {
	say "installing $*"
	apt_update
	DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends "$@" >&2
}

ensure_root() {
	[ "$(id -u)" = 0 ] && return
	say "debootstrap and apt need root: run this as root"
	exit 2
}

ensure_packages() {
	local missing=() package
	for package in debootstrap e2fsprogs xz-utils tar gcc libc6-dev make clang libelf-dev zlib1g-dev pkg-config \
		ca-certificates git; do
		dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'install ok installed' || missing+=("$package")
	done
	# libelf.a of Debian 13 and later wants zstd; older ones do without, having the package does no harm.
	dpkg-query -W -f '${Status}' libzstd-dev 2>/dev/null | grep -q 'install ok installed' || missing+=(libzstd-dev)
	[ ${#missing[@]} = 0 ] || apt_install "${missing[@]}"
}

cargo_is_new_enough() {
	local minor
	minor=$("$1" --version 2>/dev/null | sed -n 's/^cargo 1\.\([0-9]*\)\..*/\1/p')
	[ -n "$minor" ] && [ "$minor" -ge "$wanted_cargo" ]
}

ensure_cargo() {
	[ -x "$HOME/.cargo/bin/cargo" ] && PATH="$HOME/.cargo/bin:$PATH"
	if ! cargo_is_new_enough cargo; then
		# Debian's own rustc is older; the one its browsers are built with is new enough.
		if ! cargo_is_new_enough /usr/bin/cargo; then apt_install rustc-web cargo-web; fi
		PATH="/usr/bin:$PATH"
		cargo_is_new_enough cargo || {
			say "no cargo of at least 1.$wanted_cargo: neither this machine's nor Debian's rustc-web and cargo-web"
			exit 2
		}
	fi
	export PATH
	say "$(cargo --version)"
}

qemu_major() { qemu-system-x86_64 --version 2>/dev/null | sed -n 's/.*version \([0-9]*\)\..*/\1/p'; }

# qemu 7.2 makes newer guest kernels panic now and then; from 10 on they do not.
ensure_qemu() {
	[ "$(qemu_major)" ] && [ "$(qemu_major)" -ge 10 ] && return
	local codename mirror
	apt_update
	codename=$(sed -n 's/^VERSION_CODENAME=//p' /etc/os-release)
	if ! apt-cache policy qemu-system-x86 | grep -q "^ *[a-z0-9:.+~-]*~bpo\|^ *1:1[0-9]\."; then
		mirror=$(cargo run -q -p lab -- mirror)
		say "adding $codename-backports of the machine's own mirror, for qemu"
		cat >/etc/apt/sources.list.d/ovs-graceful-lab-backports.sources <<-X
			Types: deb
			URIs: $mirror
			Suites: $codename-backports
			Components: main
			Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
		X
		apt-get update -q >&2
	fi
	DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends -t "$codename-backports" \
		qemu-system-x86 >&2 || apt_install qemu-system-x86
	[ "$(qemu_major)" -ge 10 ] || say "warning: qemu $(qemu_major) is older than 10, the guest may panic (a lab error)"
}

ensure_everything() {
	ensure_root
	ensure_packages
	ensure_cargo
	ensure_qemu
	say "$(qemu-system-x86_64 --version | head -1)"
}
