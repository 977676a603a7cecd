//! Writes manual pages and shell completions of both programs to a folder: `documents FOLDER`. From the definitions that
//! the programs parse their command lines with; a package is made with it (`debian/rules`, `rhel/`).

use std::error::Error;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use clap::{Command, CommandFactory};
use clap_complete::{generate, Shell};
use clap_mangen::Man;

#[path = "../../dpfreeze/src/bin/dpfreeze/args.rs"]
pub mod dpfreeze_args;

/// Of the manual: programs for who administers the system.
const SECTION: &str = "8";

fn main() -> Result<(), Box<dyn Error>> {
    let folder = PathBuf::from(std::env::args_os().nth(1).ok_or("usage: documents FOLDER")?);
    fs::create_dir_all(&folder)?;
    for mut command in [orchestrator::cli::Cli::command(), dpfreeze_args::Cli::command()] {
        let name = command.get_name().to_owned();
        for (shell, file) in [
            (Shell::Bash, format!("{name}.bash")),
            (Shell::Fish, format!("{name}.fish")),
            (Shell::Zsh, format!("_{name}")),
        ] {
            fs::write(folder.join(file), completions(&command, shell)?)?;
        }
        command.build();
        pages(&command, command.get_name(), &folder)?;
    }
    Ok(())
}

/// The completions of `command` for `shell`, without what is hidden.
pub fn completions(command: &Command, shell: Shell) -> Result<String, Box<dyn Error>> {
    let (name, mut script) = (command.get_name().to_owned(), Vec::new());
    generate(shell, &mut shown(command), &name, &mut script);
    let script = String::from_utf8(script)?;
    // clap_complete 4.6 makes one name of the states and another of their arms where a program's name has a hyphen
    // (clap-rs/clap#6421): every word after the first was completed by nothing.
    Ok(match shell {
        Shell::Bash => {
            let [whole, first] = [name.replace('-', "__"), name.replace('-', "__subcmd__")];
            script.replace(&first, &whole)
        }
        _ => script,
    })
}

/// `command` without the subcommands that are not for people; clap_complete would offer them.
fn shown(command: &Command) -> Command {
    // clap wants names that live for ever; these are few.
    let name: &str = command.get_name().to_owned().leak();
    let copy = Command::new(name)
        .about(command.get_about().cloned().unwrap_or_default())
        .args(command.get_arguments().cloned());
    let inner = command.get_subcommands().filter(|inner| !inner.is_hide_set()).map(shown);
    copy.subcommands(inner)
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
