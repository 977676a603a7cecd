//! Does the installed database tool convert the database? Tried on a copy.

use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use crate::host::real::{command, ovsdb_server};
use crate::host::surroundings::CheckOptions;
use crate::host::Daemon;
use crate::report::{Findings, Name};

/// Converts a copy of the database with the installed tool (hazards 18).
pub(super) fn look(server: &Daemon, options: &CheckOptions, until: Instant, found: &mut Findings) {
    let file = ovsdb_server::database_file(server);
    let object = file.display().to_string();
    match conversion(server, &file, options, until) {
        Ok(false) => found.ok(Name::Schema, object, "the installed schema is the one it has"),
        Ok(true) if options.replace_ovsdb => {
            found.ok(Name::Schema, object, "a copy of it was converted to the new schema")
        }
        Ok(true) => found.refuse(
            Name::Schema,
            object,
            "the installed version has a newer schema, and with --no-ovsdb it would not be converted",
            "leave `--no-ovsdb` out",
        ),
        Err(cause) => found.refuse(
            Name::Schema,
            object,
            format!("the installed ovsdb-tool cannot convert a copy of it: {cause}"),
            "repair the database or the package first: a failed conversion ends in an empty database",
        ),
    }
}

/// Whether the database needs a conversion, and whether that works, tried on a copy in a directory of our own.
fn conversion(server: &Daemon, file: &Path, options: &CheckOptions, until: Instant) -> Result<bool, String> {
    let text = |e: &dyn std::fmt::Display| e.to_string();
    let parent = options.run_directory.parent().unwrap_or(Path::new("/run"));
    let directory = Private::create(parent).map_err(|e| text(&e))?;
    let copy = directory.0.join("conf.db");
    copy_to(&copy, server, file).map_err(|e| format!("cannot copy it: {e}"))?;
    let schema = ovsdb_server::schema_file(server);
    let (copy, schema) = (copy.to_string_lossy().into_owned(), schema.to_string_lossy().into_owned());
    let tool = |words: &[&str]| command::run_well("ovsdb-tool", words, None, until).map_err(|e| text(&e));
    if tool(&["needs-conversion", &copy, &schema])?.trim() != "yes" {
        return Ok(false);
    }
    tool(&["convert", &copy, &schema])?;
    Ok(true)
}

fn copy_to(copy: &Path, server: &Daemon, file: &Path) -> std::io::Result<u64> {
    std::io::copy(&mut ovsdb_server::open_database(server, file)?, &mut fs::File::create_new(copy)?)
}

/// A directory that only root can look into and that goes when we do.
struct Private(PathBuf);

impl Private {
    fn create(parent: &Path) -> std::io::Result<Self> {
        let path = parent.join(format!("ovs-graceful-check.{}", std::process::id()));
        fs::DirBuilder::new().mode(0o700).create(&path)?;
        Ok(Private(path))
    }
}

impl Drop for Private {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_private_directory_is_private_and_goes() {
        use std::os::unix::fs::PermissionsExt;
        let parent = tempfile::tempdir().unwrap();
        let private = Private::create(parent.path()).unwrap();
        assert_eq!(fs::metadata(&private.0).unwrap().permissions().mode() & 0o777, 0o700);
        assert!(Private::create(parent.path()).is_err());
        drop(private);
        assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 0);
    }
}
