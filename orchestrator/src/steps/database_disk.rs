//! Writing the database although its disk does not take it, and leaving nothing of that behind.

use std::time::{Duration, Instant};

use anyhow::{anyhow, Context};

use super::{Run, Stop};
use crate::host::database_disk::{in_memory, Measure, Measures, DISK_REMEDY, TRY_AGAIN};
use crate::host::{Database, Result};
use crate::recovery::look_after_database;

/// With less than this free, bytes, nothing more is begun: what daemons and we write during a run is less.
const RUN_MIN: u64 = 64 << 10;
/// How long the server may take to write the database to its disk.
const WRITE_BACK: Duration = Duration::from_secs(10);

/// Does `transaction` as soon as the database can be written, for which everything is done that helps, until `until`.
pub(super) fn write<T>(
    run: &mut Run,
    until: Instant,
    mut transaction: impl FnMut(&dyn Database) -> Result<T>,
) -> std::result::Result<T, Stop> {
    let mut measures = Measures::default();
    loop {
        let error = match transaction(run.host.database.as_ref()) {
            Ok(done) => return Ok(done),
            Err(error) => error,
        };
        let now = run.now();
        match measures.after(error, run.host.database.as_ref(), now, until)? {
            Measure::Waited => run.host.clock.sleep(TRY_AGAIN),
            Measure::Room(told) | Measure::Memory(told) | Measure::Failed(told) => run.warn(told),
        }
        run.checkpoint()?;
    }
}

/// Before flow-restore-wait is set: room for its removal. Where the file is not known the run goes on without.
pub(super) fn keep_ballast(run: &mut Run) -> std::result::Result<(), Stop> {
    match run.host.database.keep_ballast() {
        Err(error) if error.unwritable => Err(error).context("keeping room for the removal of flow-restore-wait")?,
        Err(error) => run.warn(format!("no room is kept for the removal of flow-restore-wait: {error}")),
        Ok(()) => {}
    }
    Ok(())
}

/// Before the point of no return: what can be undone is undone, where the disk has got into trouble.
pub(super) fn must_be_well(run: &mut Run) -> std::result::Result<(), Stop> {
    match run.host.database.look_at_disk() {
        Ok(file) if !file.in_memory && file.free < RUN_MIN => {
            let (path, free) = (file.path.display(), file.free >> 10);
            Err(anyhow!("{path}: {free} KiB free on the disk of the database; {DISK_REMEDY}").into())
        }
        Err(error) if error.unwritable => Err(error.into()),
        Ok(_) | Err(_) => Ok(()),
    }
}

/// May the daemon be in step with the database and unable to say so?
pub(super) fn is_in_trouble(run: &Run) -> bool {
    let looked = run.host.database.glance_at_disk();
    looked.map_or_else(|error| error.unwritable, |file| !file.in_memory && file.free < RUN_MIN)
}

/// Nothing of ours is left beside the database, and it is on its disk again, or somebody is told and looks after it. May be
/// done twice.
pub(super) fn tidy(run: &mut Run) {
    let database = run.host.database.as_ref();
    let dropped = database.drop_ballast().or_else(|_| database.drop_ballast());
    let written = database.write_back(run.now() + WRITE_BACK);
    if dropped.is_err() || written.is_err() {
        if let Err(error) = look_after_database(run.host.services.as_ref()) {
            run.warn(format!(
                "{error:#}: `ovs-graceful recover` has to be typed once the disk of the database can be written"
            ));
        }
    }
    if let Err(error) = dropped {
        run.warn(format!("{error}: it is removed once the disk can be written"));
    }
    match written {
        Ok(false) => {}
        Ok(true) => run.note("the database is on its disk again"),
        Err(error) => {
            let told = format!("{error}; {}", in_memory());
            if !run.report.differences.contains(&told) {
                run.report.differences.push(told);
            }
        }
    }
}
