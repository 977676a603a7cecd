//! Writes manual pages and shell completions of both programs to a folder: `documents FOLDER`. From the definitions that
//! the programs parse their command lines with; a package is made with it (`debian/rules`, `rhel/`).

use std::error::Error;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use clap::{Command, CommandFactory};
use clap_complete::{generate_to, Shell};
use clap_mangen::Man;

#[path = "../../dpfreeze/src/bin/dpfreeze/args.rs"]
mod dpfreeze_args;

/// Of the manual: programs for who administers the system.
const SECTION: &str = "8";

fn main() -> Result<(), Box<dyn Error>> {
    let folder = PathBuf::from(std::env::args_os().nth(1).ok_or("usage: documents FOLDER")?);
    fs::create_dir_all(&folder)?;
    for mut command in [orchestrator::cli::Cli::command(), dpfreeze_args::Cli::command()] {
        for shell in [Shell::Bash, Shell::Fish, Shell::Zsh] {
            let name = command.get_name().to_owned();
            generate_to(shell, &mut command, name, &folder)?;
        }
        command.build();
        pages(&command, command.get_name(), &folder)?;
    }
    Ok(())
}

/// `NAME.8` and a page for every subcommand that is shown, as git has them: `NAME-SUBCOMMAND.8`.
fn pages(command: &Command, name: &str, folder: &Path) -> Result<(), Box<dyn Error>> {
    // clap wants names that live for ever; these are few.
    let whole: &str = name.to_owned().leak();
    let shown = command.clone().name(whole).display_name(whole);
    let page = Man::new(shown).section(SECTION).manual("ovs-graceful");
    page.render(&mut File::create(folder.join(format!("{name}.{SECTION}")))?)?;
    for inner in command.get_subcommands().filter(|inner| !inner.is_hide_set() && inner.get_name() != "help") {
        pages(inner, &format!("{name}-{}", inner.get_name()), folder)?;
    }
    Ok(())
}
