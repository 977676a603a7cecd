//! What Check looks at on the host: daemons, programs, units, disks, the new database tool. Nothing is touched.

mod daemons;
mod disks;
mod options;
mod programs;
mod schema;
mod server;
mod services;
mod sockets;
mod switch;

use std::time::Instant;

use super::limits;
use crate::host::surroundings::{CheckOptions, Known};
use crate::host::{Daemons, ServiceManager};
use crate::report::{Finding, Findings, Name};

/// Looks at the host. Where the daemons do not run, what is theirs cannot be looked at.
pub fn findings(
    daemons: &dyn Daemons,
    services: &dyn ServiceManager,
    known: &Known<'_>,
    options: &CheckOptions,
    until: Instant,
) -> Vec<Finding> {
    let mut found = Findings::default();
    // First, because the tools may be those of the daemons' container.
    let running = daemons::running(daemons, known, &mut found);
    programs::tools(until, &mut found);
    disks::look(options, &mut found);
    let Some((vswitchd, server)) = running else { return found.into_inner() };
    daemons::namespaces(&vswitchd, &mut found);
    daemons::container(&vswitchd, options, &mut found);
    programs::versions(daemons, &vswitchd, known.versions, options, until, &mut found);
    if server.contained || options.elsewhere {
        let cause = "the container of the new ovsdb-server brings it, and converts the database";
        found.ok(Name::Schema, "database", cause);
    } else {
        schema::look(&server, options, until, &mut found);
        server::look(daemons, services, &server, options, until, &mut found);
    }
    if let Some(facts) = known.facts {
        switch::look(daemons, &vswitchd, facts, until, &mut found);
    }
    let replaced = Some(&server).filter(|server| options.replace_ovsdb && !server.contained);
    sockets::look(&vswitchd, replaced, known.facts, &mut found);
    services::look(services, &vswitchd, &server, options, until, &mut found);
    limits::look(&vswitchd, options, &mut found);
    found.into_inner()
}
