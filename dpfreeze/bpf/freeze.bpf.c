// SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only)
/*
 * Refuses, while a lease lasts, the netlink messages that would destroy what the openvswitch datapath and the
 * conntrack timeout policies know: of one network namespace, of listed datapaths, from everybody but one process.
 *
 * security_netlink_send() runs in netlink_sendmsg() after the copy and before delivery: the skb is linear and holds
 * all messages of the sendmsg. A non-zero answer fails the sendmsg as a whole, with nothing delivered.
 *
 * The answer is EBUSY, and ENOENT where qdiscs are concerned. Never EAGAIN, ENOBUFS or EINTR: the OVS daemons repeat on
 * those for ever. The one exception is the thread in `halt`, which shall repeat, once its tracer has seen the message.
 */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>
#include <bpf/bpf_core_read.h>

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define ENOENT 2
#define EBUSY 16
#define CAP_NET_ADMIN_BIT 12 /* linux/capability.h */
#define EINTR 4
#define SIGURG 23	  /* asm-generic/signal.h */
#define NETLINK_ROUTE 0	  /* linux/netlink.h */
#define NETLINK_NETFILTER 12
#define NETLINK_GENERIC 16
#define NLM_F_REQUEST 1
#define NLM_F_DUMP 0x300
#define NLMSG_MIN_TYPE 0x10
#define NLA_TYPE_MASK 0x3fff
#define NLMSG_HDRLEN 16
#define NLA_HDRLEN 4
#define OVS_HDRLEN (NLMSG_HDRLEN + 4 + 4) /* + struct genlmsghdr + struct ovs_header */
#define NFNL_HDRLEN (NLMSG_HDRLEN + 4)	  /* + struct nfgenmsg */

/* linux/openvswitch.h; DEL and SET are the same for datapath, vport and flow */
#define OVS_VPORT_CMD_NEW 1
#define OVS_CMD_DEL 2
#define OVS_CMD_SET 4
#define OVS_METER_CMD_DEL 3
#define OVS_DP_ATTR_NAME 1
#define OVS_DP_ATTR_USER_FEATURES 5
#define OVS_DP_ATTR_PER_CPU_PIDS 8
#define OVS_VPORT_ATTR_PORT_NO 1
#define OVS_VPORT_ATTR_NAME 3
#define OVS_VPORT_ATTR_UPCALL_PID 5
#define OVS_FLOW_ATTR_KEY 1
#define OVS_FLOW_ATTR_UFID 9
#define MAX_UFID_LENGTH 16 /* net/openvswitch/flow.h */
#define OVS_METER_ATTR_ID 1
/* lib/dpif-netlink.c, probe_broken_meters__(): left undeleted, these two would stay in the datapath for ever */
#define PROBE_METER_1 54545401
#define PROBE_METER_2 54545402
/* The same since 3.3.7, 3.4.5, 3.5.3, 3.6.1 and 3.7. A controller's meters may have these ids: then none is probed */
#define NEW_PROBE_METER_1 1021
#define NEW_PROBE_METER_2 1022

/* linux/rtnetlink.h */
#define RTM_DELLINK 17
#define RTM_NEWQDISC 36
#define RTM_DELQDISC 37
#define RTM_GETTCLASS 42
#define RTM_NEWTFILTER 44
/* linux/pkt_sched.h: TC_H_MAKE(TC_H_INGRESS, TC_H_MIN_INGRESS) */
#define TC_INGRESS_PARENT 0xfffffff2

/* linux/netfilter/nfnetlink.h, nfnetlink_cttimeout.h */
#define NFNL_MSG_BATCH_BEGIN 16
#define CTTIMEOUT_DELETE ((8 << 8) | 2)
#define CTA_TIMEOUT_NAME 1

#define MAX_MESSAGES 64 /* OVS batches at most 50 operations */
#define MAX_ATTRS 16
#define MAX_PIDS 4096
#define MAX_USERNS_DEPTH 33
#define IFNAMSIZ 16
#define TIMEOUT_NAME_LEN 32	     /* CTNL_TIMEOUT_NAME_MAX */
#define NSEC_PER_CLOCK_TICK 10000000 /* USER_HZ is 100: the unit of starttime in /proc/PID/stat */

/* What may be refused: bit numbers of config.classes, indices of `refused`. Same order as Classes in Rust. */
enum class {
	FLOW_FLUSH,
	FLOW_DEL,
	FLOW_SET,
	DP_DEL,
	VPORT_DEL,
	METER_DEL,
	CT_TIMEOUT_DEL,
	UPCALL_BIND,
	QDISC_DEL,
	/* More than MAX_MESSAGES in one sendmsg: refused unseen whatever the classes; only counted under this index. */
	TOO_MANY,
	CLASSES,
	NONE = 0xffff,
};

enum event_kind {
	EVENT_VPORT_DEL_REFUSED = 1, /* port_no or name says which */
	EVENT_BOUND_BY_OTHER = 2,    /* count = port ids in the message, which has passed */
	EVENT_TOO_MANY = 3,	     /* count = bytes of the sendmsg */
	EVENT_CAPTURED = 4,	     /* count = port ids captured */
};

/* All words, so that user space needs no layout rules; each is read once. */
struct config {
	u64 classes;	   /* 1 << enum class */
	u64 lease_ns;	   /* CLOCK_BOOTTIME; moved by renewals */
	u64 end_ns;	   /* CLOCK_BOOTTIME; moved by nothing */
	u64 netns;	   /* inode of the network namespace */
	u64 exempt_tgid;   /* the supervisor, numbers of the initial pid namespace */
	u64 exempt_start;  /* its start, clock ticks since boot as in /proc/PID/stat */
	u64 standby_tgid;  /* whose upcall binding is captured; 0 = nobody's */
	u64 standby_start;
	u64 fam_datapath;  /* generic netlink family ids; 0 = family absent */
	u64 fam_vport;
	u64 fam_flow;
	u64 fam_meter;
	u64 timeout_names; /* how many names `timeouts` holds */
	u64 armed_ns;	   /* CLOCK_BOOTTIME of the arming, for reports */
	u64 probe_meters;  /* not 0: NEW_PROBE_METER_1 and _2 were nobody's when it was armed */
};

/* The thread that is stopped for its tracer when it adds or deletes a port (tunnel::Adoption). */
struct halt {
	u64 tid; /* number in the initial pid namespace; 0 = nobody */
	u64 fam_vport;
};

struct captured {
	u64 sequence; /* odd while the program writes */
	u64 count;    /* how often the standby tried */
	u64 tgid;
	u64 start;
	u64 at_ns;
	u64 dp_ifindex;
	u64 has_features;
	u64 features;
	u64 pids_wanted; /* as the message has them; more than MAX_PIDS: none kept */
	u64 per_vport;	 /* tried by VPORT_SET: no pids are kept, their sockets are closed when it is refused */
	u32 pids[MAX_PIDS];
};

struct event {
	u64 kind;
	u64 at_ns;
	u64 tgid;
	u64 start;
	u64 dp_ifindex;
	u64 port_no; /* ~0: the message names the port instead */
	u64 count;
	char name[IFNAMSIZ];
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct config);
} config SEC(".maps");

/* Not part of config: the tracing thread writes it while others renew the lease. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct halt);
} halt SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, CLASSES);
	__type(key, u32);
	__type(value, u64);
} refused SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct captured);
} captured SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 64);
	__type(key, u32);
	__type(value, u32);
} datapaths SEC(".maps");

/* The kernel prefers OVS_DP_ATTR_NAME to dp_ifindex where a message has both. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 64);
	__type(key, char[IFNAMSIZ]);
	__type(value, u32);
} dp_names SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, char[TIMEOUT_NAME_LEN]);
	__type(value, u32);
} timeouts SEC(".maps");

/* What the standby may not delete; parent 0: whose classes it may not list; TC_INGRESS_PARENT: whose policing is kept. */
struct kept {
	u32 ifindex;
	u32 parent; /* TC_H_ROOT, TC_H_INGRESS */
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct kept);
	__type(value, u32);
} qdiscs SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 65536);
} events SEC(".maps");

/* The message of which an event was told though it passed: the second program comes to it as well. */
struct told {
	u64 message;
	u64 sender;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct told);
} told SEC(".maps");

/* Kernel structures, only the members that are read; offsets come from the running kernel's BTF. */
#define CORE __attribute__((preserve_access_index))
struct ns_common {
	u32 inum;
} CORE;
struct user_namespace {
	struct user_namespace *parent;
} CORE;
struct net {
	struct ns_common ns;
	struct user_namespace *user_ns;
} CORE;
typedef struct {
	struct net *net;
} CORE possible_net_t;
struct sock_common {
	possible_net_t skc_net;
} CORE;
struct sock {
	struct sock_common __sk_common;
	u16 sk_protocol;
} CORE;
struct sk_buff {
	u32 len;
	unsigned char *data;
} CORE;
struct caps {
	u32 low;
} CORE;
struct cred {
	struct caps cap_effective; /* kernel_cap_t: two u32 to 6.2, one u64 since; the low half is first in both */
	struct user_namespace *user_ns;
} CORE;
struct task_struct {
	struct task_struct *group_leader;
	const struct cred *cred;
	unsigned int ptrace;
	u64 start_boottime;
} CORE;

struct nlmsg {
	u32 len;
	u16 type;
	u16 flags;
	u32 seq;
	u32 pid;
};
struct genl {
	u8 cmd;
	u8 version;
	u16 reserved;
	u32 dp_ifindex;
};
struct tcmsg {
	u32 family; /* and padding */
	u32 ifindex;
	u32 handle;
	u32 parent;
	u32 info;
};
struct nlattr_head {
	u16 len;
	u16 type;
};

char LICENSE[] SEC("license") = "Dual BSD/GPL";

static __always_inline struct config *get_config(void)
{
	u32 zero = 0;

	return bpf_map_lookup_elem(&config, &zero);
}

static __always_inline u64 current_tgid(void)
{
	return bpf_get_current_pid_tgid() >> 32;
}

static __always_inline u64 current_start(void)
{
	struct task_struct *task = (void *)bpf_get_current_task();

	return BPF_CORE_READ(task, group_leader, start_boottime) / NSEC_PER_CLOCK_TICK;
}

/*
 * Has the sender CAP_NET_ADMIN over this namespace? The kernel asks only after this hook, so without the question a
 * local user could make the counters lie. Without the capability a message is let by: it will be refused anyway.
 */
static __always_inline int capable(struct net *net)
{
	struct task_struct *task = (void *)bpf_get_current_task();
	const struct cred *cred = BPF_CORE_READ(task, cred);
	struct user_namespace *own = BPF_CORE_READ(cred, user_ns);
	struct user_namespace *target = BPF_CORE_READ(net, user_ns);
	u32 effective = 0;

	bpf_core_read(&effective, sizeof(effective), &cred->cap_effective);
	if (!(effective & (1u << CAP_NET_ADMIN_BIT)))
		return 0;
	for (int i = 0; i < MAX_USERNS_DEPTH; i++) {
		if (!target)
			return 0;
		if (target == own)
			return 1;
		target = BPF_CORE_READ(target, parent);
	}
	return 0;
}

static __always_inline void count(u32 class)
{
	u64 *counter = bpf_map_lookup_elem(&refused, &class);

	if (counter)
		__sync_fetch_and_add(counter, 1);
}

static __always_inline struct event *new_event(u64 kind, u32 dp_ifindex)
{
	struct event *event = bpf_ringbuf_reserve(&events, sizeof(*event), 0);

	if (!event)
		return 0;
	event->kind = kind;
	event->at_ns = bpf_ktime_get_boot_ns();
	event->tgid = current_tgid();
	event->start = current_start();
	event->dp_ifindex = dp_ifindex;
	event->port_no = ~0ull;
	event->count = 0;
	__builtin_memset(event->name, 0, sizeof(event->name));
	return event;
}

static __always_inline void tell(u64 kind, u32 dp_ifindex, u64 n)
{
	struct event *event = new_event(kind, dp_ifindex);

	if (event) {
		event->count = n;
		bpf_ringbuf_submit(event, 0);
	}
}

/* Has the other program told of this message? Asked once by each of the two, or by the one that the kernel calls. */
static __always_inline int told_before(u64 message)
{
	u32 zero = 0;
	u64 sender = bpf_get_current_pid_tgid();
	struct told *last = bpf_map_lookup_elem(&told, &zero);

	if (!last)
		return 0;
	if (last->message == message && last->sender == sender) {
		last->message = 0;
		return 1;
	}
	last->message = message;
	last->sender = sender;
	return 0;
}

/* Global functions are verified once, on their own: that keeps 64 messages times 16 attributes within 5.10's limit. */

/* Offset of the first attribute of this type between off and end, or 0. */
__attribute__((noinline)) int find_attr(u64 data, u32 off, u32 end, u32 type)
{
	struct nlattr_head attr;

	for (int i = 0; i < MAX_ATTRS; i++) {
		if (off > end || end - off < NLA_HDRLEN)
			return 0;
		if (bpf_probe_read_kernel(&attr, sizeof(attr), (void *)(data + off)))
			return 0;
		if (attr.len < NLA_HDRLEN || attr.len > end - off)
			return 0;
		if ((attr.type & NLA_TYPE_MASK) == type)
			return off;
		off += ((u32)attr.len + 3) & ~3u;
	}
	return 0;
}

static __always_inline u32 attr_u32(u64 data, u32 at)
{
	u32 value = 0;

	bpf_probe_read_kernel(&value, sizeof(value), (void *)(data + at + NLA_HDRLEN));
	return value;
}

/* Is this OVS_DP message about a listed datapath? By name where it has one, as get_dp() in the kernel does. */
__attribute__((noinline)) int dp_in_scope(u64 data, u32 off, u32 end, u32 dp_ifindex)
{
	char name[IFNAMSIZ] = {};
	u32 at = find_attr(data, off, end, OVS_DP_ATTR_NAME);

	if (!at)
		return bpf_map_lookup_elem(&datapaths, &dp_ifindex) != 0;
	bpf_probe_read_kernel_str(name, sizeof(name), (void *)(data + at + NLA_HDRLEN));
	return bpf_map_lookup_elem(&dp_names, name) != 0;
}

/* Keeps what the standby wanted to bind: port ids and features. */
__attribute__((noinline)) int capture(u64 data, u32 off, u32 end, u32 dp_ifindex, u32 at)
{
	u32 zero = 0, features, bytes;
	struct nlattr_head attr = {};
	struct captured *to = bpf_map_lookup_elem(&captured, &zero);

	if (!to || bpf_probe_read_kernel(&attr, sizeof(attr), (void *)(data + at)) || attr.len < NLA_HDRLEN)
		return 0;
	bytes = (u32)attr.len - NLA_HDRLEN;
	__sync_fetch_and_add(&to->sequence, 1);
	to->tgid = current_tgid();
	to->start = current_start();
	to->at_ns = bpf_ktime_get_boot_ns();
	to->dp_ifindex = dp_ifindex;
	features = find_attr(data, off, end, OVS_DP_ATTR_USER_FEATURES);
	to->has_features = features != 0;
	to->features = features ? attr_u32(data, features) : 0;
	to->pids_wanted = bytes >> 2;
	to->per_vport = 0;
	if (bytes <= sizeof(to->pids))
		bpf_probe_read_kernel(to->pids, bytes, (void *)(data + at + NLA_HDRLEN));
	__sync_fetch_and_add(&to->count, 1);
	__sync_fetch_and_add(&to->sequence, 1);
	tell(EVENT_CAPTURED, dp_ifindex, bytes >> 2);
	return 0;
}

/* The standby would bind, one port at a time; it tries again whenever its main loop turns (udpif_set_threads()). */
__attribute__((noinline)) int capture_vport(u32 dp_ifindex)
{
	u32 zero = 0;
	struct captured *to = bpf_map_lookup_elem(&captured, &zero);

	if (!to)
		return 0;
	__sync_fetch_and_add(&to->sequence, 1);
	to->tgid = current_tgid();
	to->start = current_start();
	to->at_ns = bpf_ktime_get_boot_ns();
	to->dp_ifindex = dp_ifindex;
	to->has_features = 0;
	to->pids_wanted = 0;
	to->per_vport = 1;
	__sync_fetch_and_add(&to->count, 1);
	__sync_fetch_and_add(&to->sequence, 1);
	return 0;
}

static __always_inline int is_standby(struct config *conf)
{
	return conf->standby_tgid && current_tgid() == conf->standby_tgid && current_start() == conf->standby_start;
}

__attribute__((noinline)) int classify_datapath(u64 data, u32 off, u32 end, u32 cmd, u32 dp_ifindex)
{
	struct config *conf = get_config();
	struct nlattr_head attr = {};
	u32 at;

	if (!conf || (cmd != OVS_CMD_DEL && cmd != OVS_CMD_SET))
		return NONE;
	if (!dp_in_scope(data, off, end, dp_ifindex))
		return NONE;
	if (cmd == OVS_CMD_DEL)
		return DP_DEL;
	/* A DP_SET without port ids is a feature probe: any refusal of it is fatal to the daemon. */
	at = find_attr(data, off, end, OVS_DP_ATTR_PER_CPU_PIDS);
	if (!at)
		return NONE;
	if (conf->classes & (1 << UPCALL_BIND) && is_standby(conf)) {
		capture(data, off, end, dp_ifindex, at);
		return UPCALL_BIND;
	}
	/* Anybody else must be able to bind: a respawned daemon that cannot brings no bridge up (hazard 1). */
	bpf_probe_read_kernel(&attr, sizeof(attr), (void *)(data + at));
	if (!told_before(data + off))
		tell(EVENT_BOUND_BY_OTHER, dp_ifindex, ((u32)attr.len - NLA_HDRLEN) >> 2);
	return NONE;
}

__attribute__((noinline)) int classify_vport(u64 data, u32 off, u32 end, u32 cmd, u32 dp_ifindex)
{
	struct config *conf = get_config();
	struct event *event;
	u32 name;

	if (conf && cmd == OVS_CMD_SET && conf->classes & (1 << UPCALL_BIND) && is_standby(conf) &&
	    bpf_map_lookup_elem(&datapaths, &dp_ifindex) && find_attr(data, off, end, OVS_VPORT_ATTR_UPCALL_PID)) {
		capture_vport(dp_ifindex);
		return UPCALL_BIND;
	}
	if (!conf || cmd != OVS_CMD_DEL)
		return NONE;
	name = find_attr(data, off, end, OVS_VPORT_ATTR_NAME);
	/* With a name the kernel takes dp_ifindex 0 for "any datapath". */
	if (!bpf_map_lookup_elem(&datapaths, &dp_ifindex) && !(name && !dp_ifindex))
		return NONE;
	if (!(conf->classes & (1 << VPORT_DEL)))
		return NONE;
	/* The daemon does not try again: whoever thaws has to (hazard 7). */
	event = new_event(EVENT_VPORT_DEL_REFUSED, dp_ifindex);
	if (event) {
		u32 port_no = find_attr(data, off, end, OVS_VPORT_ATTR_PORT_NO);

		if (name)
			bpf_probe_read_kernel_str(event->name, sizeof(event->name), (void *)(data + name + NLA_HDRLEN));
		else if (port_no)
			event->port_no = attr_u32(data, port_no);
		bpf_ringbuf_submit(event, 0);
	}
	return VPORT_DEL;
}

__attribute__((noinline)) int classify_flow(u64 data, u32 off, u32 end, u32 cmd, u32 dp_ifindex)
{
	struct nlattr_head ufid = {};
	u32 at;

	if (cmd != OVS_CMD_DEL && cmd != OVS_CMD_SET)
		return NONE;
	if (!bpf_map_lookup_elem(&datapaths, &dp_ifindex))
		return NONE;
	if (cmd == OVS_CMD_SET)
		return FLOW_SET;
	/* Deletions by key are the feature probes tidying up (hazard 6). */
	if (find_attr(data, off, end, OVS_FLOW_ATTR_KEY))
		return NONE;
	/* Without key and usable UFID ovs_flow_cmd_del() flushes, whatever else the message carries. */
	at = find_attr(data, off, end, OVS_FLOW_ATTR_UFID);
	if (!at || bpf_probe_read_kernel(&ufid, sizeof(ufid), (void *)(data + at)))
		return FLOW_FLUSH;
	return ufid.len > NLA_HDRLEN && ufid.len <= NLA_HDRLEN + MAX_UFID_LENGTH ? FLOW_DEL : FLOW_FLUSH;
}

__attribute__((noinline)) int classify_meter(u64 data, u32 off, u32 end, u32 cmd, u32 dp_ifindex)
{
	struct config *conf = get_config();
	u32 at, id;

	if (cmd != OVS_METER_CMD_DEL || !bpf_map_lookup_elem(&datapaths, &dp_ifindex))
		return NONE;
	at = find_attr(data, off, end, OVS_METER_ATTR_ID);
	id = at ? attr_u32(data, at) : 0;
	if (id == PROBE_METER_1 || id == PROBE_METER_2)
		return NONE;
	if (conf && conf->probe_meters && (id == NEW_PROBE_METER_1 || id == NEW_PROBE_METER_2))
		return NONE;
	return METER_DEL;
}

/* nfnetlink_cttimeout DELETE: with a name that one policy, without every policy that is not in use. */
__attribute__((noinline)) int classify_timeout(u64 data, u32 off, u32 end)
{
	char name[TIMEOUT_NAME_LEN] = {};
	struct config *conf = get_config();
	u32 at;

	if (!conf || !conf->timeout_names)
		return NONE;
	at = find_attr(data, off, end, CTA_TIMEOUT_NAME);
	if (!at)
		return CT_TIMEOUT_DEL;
	bpf_probe_read_kernel_str(name, sizeof(name), (void *)(data + at + NLA_HDRLEN));
	return bpf_map_lookup_elem(&timeouts, name) ? CT_TIMEOUT_DEL : NONE;
}

__attribute__((noinline)) int classify_generic(u64 data, u32 off, u32 end, u32 type)
{
	struct config *conf = get_config();
	struct genl genl;
	u32 attrs = off + OVS_HDRLEN;

	/* Family ids start there; 0 in config stands for a family that is absent. */
	if (!conf || type < NLMSG_MIN_TYPE || end - off < OVS_HDRLEN)
		return NONE;
	if (bpf_probe_read_kernel(&genl, sizeof(genl), (void *)(data + off + NLMSG_HDRLEN)))
		return NONE;
	if (type == conf->fam_flow)
		return classify_flow(data, attrs, end, genl.cmd, genl.dp_ifindex);
	if (type == conf->fam_vport)
		return classify_vport(data, attrs, end, genl.cmd, genl.dp_ifindex);
	if (type == conf->fam_datapath)
		return classify_datapath(data, attrs, end, genl.cmd, genl.dp_ifindex);
	if (type == conf->fam_meter)
		return classify_meter(data, attrs, end, genl.cmd, genl.dp_ifindex);
	return NONE;
}

static __always_inline int walk(struct config *conf, u64 data, u32 len, u16 protocol)
{
	struct nlmsg head;
	u32 off = 0, class, step;

	for (int i = 0; i < MAX_MESSAGES; i++) {
		/* The walk of netlink_rcv_skb(): it stops at the first malformed length. */
		if (off > len || len - off < NLMSG_HDRLEN)
			return 0;
		if (bpf_probe_read_kernel(&head, sizeof(head), (void *)(data + off)))
			return 0;
		if (head.len < NLMSG_HDRLEN || head.len > len - off)
			return 0;
		class = NONE;
		if (protocol == NETLINK_NETFILTER) {
			/* A batch goes to one subsystem that takes batches; that of timeout policies does not. */
			if (i == 0 && head.type == NFNL_MSG_BATCH_BEGIN)
				return 0;
			if (head.type == CTTIMEOUT_DELETE && head.flags & NLM_F_REQUEST)
				class = classify_timeout(data, off + NFNL_HDRLEN, off + head.len);
		} else if (head.flags & NLM_F_REQUEST) {
			class = classify_generic(data, off, off + head.len, head.type);
		}
		if (class < TOO_MANY && conf->classes & (1ull << class)) {
			count(class);
			return -EBUSY;
		}
		step = (head.len + 3) & ~3u;
		if (step > len - off)
			return 0;
		off += step;
	}
	if (len - off < NLMSG_HDRLEN)
		return 0;
	count(TOO_MANY);
	tell(EVENT_TOO_MANY, 0, len);
	return -EBUSY;
}

/*
 * The standby takes every qdisc for its own: at its start it deletes the ingress qdisc of each port, the root qdisc of
 * each port without QoS, and, of those with QoS, each class that it finds and the database does not have. ENOENT tells it
 * that there was nothing (tc_add_del_qdisc(), tc_del_qdisc()), or that there are no classes (htb_tc_load()): it is content
 * with that and does not ask again, as the daemon before it was. Only the first message is looked at: it sends one at a
 * time.
 */
__attribute__((noinline)) int spares_qdisc(u64 data, u32 len)
{
	struct config *conf = get_config();
	struct kept key = {};
	struct nlmsg head;
	struct tcmsg tc;

	if (!conf || !is_standby(conf) || len < NLMSG_HDRLEN + sizeof(tc))
		return 0;
	if (bpf_probe_read_kernel(&head, sizeof(head), (void *)data) ||
	    bpf_probe_read_kernel(&tc, sizeof(tc), (void *)(data + NLMSG_HDRLEN)))
		return 0;
	key.ifindex = tc.ifindex;
	if (head.type == RTM_DELQDISC)
		key.parent = tc.parent;
	else if (head.type != RTM_GETTCLASS || (head.flags & NLM_F_DUMP) != NLM_F_DUMP)
		return 0;
	if (!bpf_map_lookup_elem(&qdiscs, &key))
		return 0;
	count(QDISC_DEL);
	return 1;
}

/* Is this about the policing of a port where it is to be kept? */
__attribute__((noinline)) int is_policing(u64 data, u32 len, u32 type)
{
	struct kept key = { .parent = TC_INGRESS_PARENT };
	struct tcmsg tc;

	if (type != RTM_NEWQDISC && type != RTM_DELQDISC && type != RTM_NEWTFILTER)
		return 0;
	if (len < NLMSG_HDRLEN + sizeof(tc) || bpf_probe_read_kernel(&tc, sizeof(tc), (void *)(data + NLMSG_HDRLEN)))
		return 0;
	key.ifindex = tc.ifindex;
	return bpf_map_lookup_elem(&qdiscs, &key) != 0;
}

/*
 * Is this the traced thread about to add or delete a port or device, or to police one? Only the first message is looked
 * at: dpif_netlink_vport_transact(), dpif_netlink_rtnl_destroy() and tc_transact() send one at a time.
 */
static __always_inline int is_port_change(struct halt *of, u64 data, u32 len, u16 protocol)
{
	struct nlmsg head;
	struct genl genl;

	if (len < NLMSG_HDRLEN || bpf_probe_read_kernel(&head, sizeof(head), (void *)data))
		return 0;
	if (protocol == NETLINK_ROUTE)
		return head.type == RTM_DELLINK || is_policing(data, len, head.type);
	if (protocol != NETLINK_GENERIC || head.type != of->fam_vport || len < OVS_HDRLEN)
		return 0;
	if (bpf_probe_read_kernel(&genl, sizeof(genl), (void *)(data + NLMSG_HDRLEN)))
		return 0;
	return genl.cmd == OVS_VPORT_CMD_NEW || genl.cmd == OVS_CMD_DEL;
}

/*
 * Stops the thread by a signal that only its tracer sees (ignored by default, so harmless should the tracer die just
 * now), and lets it send the message again. Whoever has no tracer is let by.
 */
static __always_inline int halts(u64 data, u32 len, u16 protocol)
{
	u32 zero = 0;
	struct halt *of = bpf_map_lookup_elem(&halt, &zero);
	struct task_struct *task;

	if (!of || !of->tid || (u32)bpf_get_current_pid_tgid() != of->tid)
		return 0;
	task = (void *)bpf_get_current_task();
	if (!BPF_CORE_READ(task, ptrace) || !is_port_change(of, data, len, protocol))
		return 0;
	bpf_send_signal_thread(SIGURG);
	return 1;
}

static __always_inline int decide(struct sock *sk, struct sk_buff *skb)
{
	struct config *conf = get_config();
	u16 protocol = sk->sk_protocol;
	/* By a helper: since Linux 6.17 the pointer read directly is of a type to which no unbounded offset may be added. */
	u64 data = (u64)BPF_CORE_READ(skb, data);
	u32 len = skb->len;
	struct net *net;
	u64 now;

	if (halts(data, len, protocol))
		return -EINTR;
	if (!conf || !conf->classes)
		return 0;
	if (protocol == NETLINK_ROUTE && !(conf->classes & (1 << QDISC_DEL)))
		return 0;
	if (protocol != NETLINK_GENERIC && protocol != NETLINK_NETFILTER && protocol != NETLINK_ROUTE)
		return 0;
	/* The guard, which may hold for a day, has nothing to say about generic netlink, long messages included. */
	if (protocol == NETLINK_GENERIC && conf->classes == 1 << CT_TIMEOUT_DEL)
		return 0;
	now = bpf_ktime_get_boot_ns();
	if (now >= conf->lease_ns || now >= conf->end_ns)
		return 0;
	net = sk->__sk_common.skc_net.net;
	if (net->ns.inum != conf->netns)
		return 0;
	if (current_tgid() == conf->exempt_tgid && current_start() == conf->exempt_start)
		return 0;
	if (protocol == NETLINK_ROUTE)
		return spares_qdisc(data, len) ? -ENOENT : 0;
	if (!capable(net))
		return 0;
	return walk(conf, data, len, protocol);
}

/*
 * Each program is there twice, and both are attached. Linux (since 5.12) does not call a program again on a CPU where it
 * has begun and not ended: it passes over it, as if it had returned 0. A task that is preempted in the middle of decide()
 * so opens the way for all others of its CPU, until it runs again. Each copy has a mark of its own, so that a message
 * passes unseen only where both were interrupted. The counts are in bpf_prog_info.recursion_misses. Programs of LSM hooks
 * are always called since Linux 6.2.
 *
 * What one copy refuses, the other is not asked about: the trampoline goes on only while the answer is 0, which `ret` is.
 */

/* Needs no `bpf` in the boot-time list of LSMs. */
SEC("fmod_ret/security_netlink_send")
int BPF_PROG(freeze_fmod_ret, struct sock *sk, struct sk_buff *skb, int ret)
{
	return decide(sk, skb);
}

SEC("fmod_ret/security_netlink_send")
int BPF_PROG(freeze_fmod_two, struct sock *sk, struct sk_buff *skb, int ret)
{
	return decide(sk, skb);
}

SEC("lsm/netlink_send")
int BPF_PROG(freeze_lsm, struct sock *sk, struct sk_buff *skb, int ret)
{
	return decide(sk, skb);
}

SEC("lsm/netlink_send")
int BPF_PROG(freeze_lsm_two, struct sock *sk, struct sk_buff *skb, int ret)
{
	return decide(sk, skb);
}
