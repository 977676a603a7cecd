//! The datapath's ports that the database wants.

use dpfreeze::tunnel;

use crate::host::DatabaseFacts;

/// Names of the ports that an interface of the database stands for: its own name and, of a tunnel, the port that all
/// tunnels of its kind share.
pub(super) fn wanted(facts: &DatabaseFacts) -> Vec<String> {
    let interfaces = facts.bridges.iter().flat_map(|bridge| &bridge.ports).flat_map(|port| &port.interfaces);
    interfaces
        .flat_map(|interface| {
            let shared = tunnel::backer_of(&interface.kind, interface.dst_port.as_deref());
            shared.into_iter().chain([interface.name.clone()])
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::{Bridge, Interface, Port};

    #[test]
    fn a_tunnel_is_wanted_by_the_name_of_its_port() {
        let interface =
            |name: &str, kind: &str| Interface { name: name.into(), kind: kind.into(), ..Default::default() };
        let port = |interface: Interface| Port { interfaces: vec![interface], ..Port::default() };
        let ports = vec![port(interface("v1", "")), port(interface("t0", "vxlan"))];
        let facts = DatabaseFacts { bridges: vec![Bridge { ports, ..Bridge::default() }], ..Default::default() };
        assert_eq!(wanted(&facts), ["v1", "vxlan_sys_4789", "t0"]);
    }
}
