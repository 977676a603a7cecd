//! What was set by hand of a daemon's log: levels, patterns, and modules whose messages are not limited in their rate
//! (`ovs-appctl vlog/set`, `vlog/disable-rate-limit`; lib/vlog.c of OVS).
//!
//! By hand is what the daemon's own command line does not say: what a new version, or another configuration of its unit,
//! says otherwise is not fought over.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::kept::{printable, Lack};

/// Where messages go, in the order in which `vlog/list` has them.
const DESTINATIONS: [&str; 3] = ["console", "syslog", "file"];
/// Levels, as `vlog/list` has them.
const LEVELS: [&str; 6] = ["OFF", "EMER", "ERR", "WARN", "INFO", "DBG"];
/// What a module begins with, for each destination (`VLOG_DEFINE_THIS_MODULE`).
const FIRST_LEVEL: &str = "INFO";
/// What a daemon begins with (`VLOG_DESTINATIONS`), by destination.
const FIRST_PATTERNS: [&str; 3] =
    ["%D{%Y-%m-%dT%H:%M:%SZ}|%05N|%c%T|%p|%m", "ovs|%05N|%c%T|%p|%m", "%D{%Y-%m-%dT%H:%M:%S.###Z}|%05N|%c%T|%p|%m"];
/// Stands for every module.
const ANY: &str = "ANY";
/// Between the words of a setting (`vlog_set_levels_from_string`).
const BETWEEN: [char; 4] = [' ', ',', ':', '\t'];
/// How `vlog/list` marks a module that is not limited.
const UNLIMITED: &str = "(rate limiting disabled)";
/// How wide `vlog/list-pattern` makes its second column; what is longer shifts the third.
const PREFIX_WIDTH: usize = 32;

/// How a daemon logs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Logs {
    /// The level of each module, by destination.
    pub levels: BTreeMap<String, [String; 3]>,
    /// The modules that are not limited in their rate.
    pub unlimited: Vec<String>,
    /// The pattern of each destination.
    pub patterns: BTreeMap<String, String>,
}

/// What of it was set by hand.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogsByHand {
    /// Module (or `ANY`), destination and level.
    pub levels: Vec<(String, String, String)>,
    /// Destination and pattern.
    pub patterns: Vec<(String, String)>,
    /// Modules that are not limited in their rate.
    pub unlimited: Vec<String>,
}

impl Logs {
    /// From the answers to `vlog/list` and `vlog/list-pattern`. Lines of another form are passed over.
    pub fn parse(list: &str, patterns: &str) -> Logs {
        let mut logs = Logs::default();
        for line in list.lines() {
            let words: Vec<&str> = line.split_whitespace().collect();
            let [module, console, syslog, file, ..] = words[..] else { continue };
            if ![console, syslog, file].iter().all(|level| LEVELS.contains(level)) {
                continue;
            }
            logs.levels.insert(module.to_owned(), [console, syslog, file].map(str::to_owned));
            if line.contains(UNLIMITED) {
                logs.unlimited.push(module.to_owned());
            }
        }
        logs.patterns = patterns.lines().filter_map(parse_pattern).collect();
        logs
    }

    /// What of it the command line `argv` does not say.
    pub fn by_hand(&self, argv: &[String]) -> LogsByHand {
        let settings = settings(argv);
        let own = |module: &str, at: usize| own_level(&settings, argv, module, at);
        let mut by_hand = LogsByHand { unlimited: self.unlimited.clone(), ..LogsByHand::default() };
        for (at, destination) in DESTINATIONS.iter().enumerate() {
            // All alike: then so are those that only another version has.
            let mut levels = self.levels.iter().map(|(module, levels)| (module, &levels[at]));
            let common = levels.next().map(|(_, level)| level.clone()).filter(|first| levels.all(|(_, l)| l == first));
            if let Some(level) = common.filter(|level| self.levels.keys().all(|module| own(module, at) != *level)) {
                by_hand.levels.push((ANY.to_owned(), (*destination).to_owned(), level));
                continue;
            }
            let differing = self.levels.iter().filter(|(module, levels)| levels[at] != own(module, at));
            by_hand.levels.extend(
                differing.map(|(module, levels)| (module.clone(), (*destination).to_owned(), levels[at].clone())),
            );
        }
        let differing =
            self.patterns.iter().filter(|(destination, pattern)| own_pattern(&settings, destination) != **pattern);
        by_hand.patterns = differing.map(|(destination, pattern)| (destination.clone(), pattern.clone())).collect();
        by_hand
    }

    fn has_level(&self, module: &str, destination: &str, level: &str) -> bool {
        let Some(at) = DESTINATIONS.iter().position(|name| *name == destination) else { return true };
        match module {
            ANY => self.levels.values().all(|levels| levels[at] == level),
            // A module that this version does not have is nobody's loss.
            _ => self.levels.get(module).is_none_or(|levels| levels[at] == level),
        }
    }
}

impl LogsByHand {
    /// Is there anything?
    pub fn is_empty(&self) -> bool {
        *self == LogsByHand::default()
    }

    /// What a daemon that logs as `now` says lacks of it, and how it gets that; `program` is its name.
    pub fn lacks(&self, program: &str, now: &Logs) -> Vec<Lack> {
        let levels: Vec<String> = self
            .levels
            .iter()
            .filter(|(module, destination, level)| !now.has_level(module, destination, level))
            .map(|(module, destination, level)| format!("{module}:{destination}:{level}"))
            .collect();
        let other = |(destination, pattern): &&(String, String)| now.patterns.get(destination) != Some(pattern);
        let patterns: Vec<String> = self
            .patterns
            .iter()
            .filter(other)
            .map(|(destination, pattern)| format!("PATTERN:{destination}:{pattern}"))
            .collect();
        let limited = |module: &&String| now.levels.contains_key(*module) && !now.unlimited.contains(module);
        let limited: Vec<String> = self.unlimited.iter().filter(limited).cloned().collect();
        let kinds = [
            ("log levels", "vlog/set", levels),
            ("log patterns", "vlog/set", patterns),
            ("log modules without a limit of their rate", "vlog/disable-rate-limit", limited),
        ];
        let lack = |(what, command, arguments): (&str, &str, Vec<String>)| Lack {
            what: printable(&format!("{program}: {what} set by hand: {}", told(&arguments))),
            command: command.to_owned(),
            arguments,
        };
        kinds.into_iter().filter(|(_, _, arguments)| !arguments.is_empty()).map(lack).collect()
    }
}

/// So many are told where there are more of a kind.
const TOLD: usize = 5;

fn told(arguments: &[String]) -> String {
    let first = arguments.iter().take(TOLD).cloned().collect::<Vec<_>>().join(", ");
    match arguments.len().checked_sub(TOLD).filter(|more| *more > 0) {
        Some(more) => format!("{first} and {more} more"),
        None => first,
    }
}

/// `file     none                              %D{...}|%05N|...`: name, prefix and pattern. A prefix has blanks in it.
fn parse_pattern(line: &str) -> Option<(String, String)> {
    let (name, rest) = line.split_once(' ')?;
    let destination = DESTINATIONS.iter().find(|destination| name.eq_ignore_ascii_case(destination))?;
    // `%-7s  %-32s  %s`
    let rest = line.get((name.len().max(7) + 2)..).unwrap_or(rest);
    let from = rest.get(PREFIX_WIDTH..)?.find("  ")? + PREFIX_WIDTH + 2;
    Some(((*destination).to_owned(), rest.get(from..)?.to_owned()))
}

/// The settings of a command line: `-vconsole:emer`, `--verbose=file:info`, `-v`.
fn settings(argv: &[String]) -> Vec<&str> {
    let setting = |word: &String| match word.as_str() {
        "--verbose" => Some(word.len()),
        _ => ["--verbose=", "-v"].iter().find(|prefix| word.starts_with(**prefix)).map(|prefix| prefix.len()),
    };
    argv.iter().skip(1).filter_map(|word| word.get(setting(word)?..)).collect()
}

/// The level that the command line alone gives a module.
fn own_level(settings: &[&str], argv: &[String], module: &str, at: usize) -> String {
    let mut level = FIRST_LEVEL;
    for setting in settings {
        let words: Vec<&str> = setting.split(BETWEEN).filter(|word| !word.is_empty()).collect();
        if words.first().is_some_and(|first| ["PATTERN", "FACILITY"].iter().any(|it| first.eq_ignore_ascii_case(it))) {
            continue;
        }
        let is =
            |names: &[&'static str], word: &str| names.iter().copied().find(|name| name.eq_ignore_ascii_case(word));
        let named = words.iter().find_map(|word| is(&LEVELS, word)).unwrap_or("DBG");
        let to = words.iter().find_map(|word| is(&DESTINATIONS, word));
        let other = |word: &&&str| {
            is(&LEVELS, word).is_none() && is(&DESTINATIONS, word).is_none() && !word.eq_ignore_ascii_case(ANY)
        };
        let of = words.iter().find(other);
        if to.is_none_or(|to| to == DESTINATIONS[at]) && of.is_none_or(|of| of.eq_ignore_ascii_case(module)) {
            level = named;
        }
    }
    // A daemon that has detached says nothing more there (`close_standard_fds`, lib/daemon.c).
    let detached = argv.iter().any(|word| word == "--detach");
    if detached && DESTINATIONS[at] == "console" {
        level = "OFF";
    }
    level.to_owned()
}

/// The pattern that the command line alone gives a destination.
fn own_pattern(settings: &[&str], destination: &str) -> String {
    let Some(at) = DESTINATIONS.iter().position(|name| *name == destination) else { return String::new() };
    let mut pattern = FIRST_PATTERNS[at];
    for setting in settings {
        let mut words = setting.splitn(3, BETWEEN);
        let (kind, to, rest) = (words.next().unwrap_or(""), words.next().unwrap_or(""), words.next());
        let is_it = to.eq_ignore_ascii_case(destination) || to.eq_ignore_ascii_case(ANY);
        if let Some(rest) = rest.filter(|_| kind.eq_ignore_ascii_case("PATTERN") && is_it) {
            pattern = rest;
        }
    }
    pattern.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIST: &str = "                 console    syslog    file\n                 -------    ------    ------\n\
                        backtrace          OFF        ERR       INFO\n\
                        bridge             OFF        ERR        DBG    (rate limiting disabled)\n";
    const PATTERNS: &str =
        "         prefix                            format\n         ------                            ------\n\
                            CONSOLE  none                              %D{%Y-%m-%dT%H:%M:%SZ}|%05N|%c%T|%p|%m\n\
                            SYSLOG   <%B> %D{%h %e %T} %E %A:          ovs|%05N|%c%T|%p|%m\n\
                            FILE     none                              %m  twice\n";

    fn argv(words: &str) -> Vec<String> {
        words.split(' ').map(str::to_owned).collect()
    }

    fn packaged() -> Vec<String> {
        argv("ovs-vswitchd unix:/run/openvswitch/db.sock -vconsole:emer -vsyslog:err -vfile:info --mlockall --detach")
    }

    #[test]
    fn what_was_set_by_hand_is_what_the_command_line_does_not_say() {
        let logs = Logs::parse(LIST, PATTERNS);
        assert_eq!(logs.levels.len(), 2);
        assert_eq!(logs.patterns["syslog"], "ovs|%05N|%c%T|%p|%m");
        let by_hand = logs.by_hand(&packaged());
        let of = |a: &str, b: &str, c: &str| (a.to_owned(), b.to_owned(), c.to_owned());
        assert_eq!(by_hand.levels, [of("bridge", "file", "DBG")]);
        assert_eq!(by_hand.patterns, [("file".to_owned(), "%m  twice".to_owned())]);
        assert_eq!(by_hand.unlimited, ["bridge"]);
        // What the command line of the old one said is the new one's own business.
        let own = argv("ovs-vswitchd -vsyslog:err -vbridge:file:dbg --verbose=PATTERN:file:%m  --detach");
        let own = [own, vec!["-vPATTERN:FILE:%m  twice".to_owned()]].concat();
        let rest = logs.by_hand(&own);
        assert_eq!((rest.levels.len(), rest.patterns.len()), (0, 0), "{rest:?}");
    }

    #[test]
    fn all_modules_alike_are_so_in_another_version_as_well() {
        let list = LIST.replace("  ERR", "  DBG").replace(UNLIMITED, "");
        let by_hand = Logs::parse(&list, "").by_hand(&packaged());
        assert!(by_hand.levels.contains(&("ANY".to_owned(), "syslog".to_owned(), "DBG".to_owned())), "{by_hand:?}");
        let now = Logs::parse(&LIST.replace("bridge", "bond  "), "");
        let lacks = by_hand.lacks("ovs-vswitchd", &now);
        assert_eq!(lacks.len(), 1);
        assert_eq!(lacks[0].arguments, ["ANY:syslog:DBG"]);
        assert!(lacks[0].what.contains("ovs-vswitchd: log levels"), "{}", lacks[0].what);
    }

    #[test]
    fn what_is_as_it_was_lacks_nothing_and_a_module_that_is_gone_is_nobody_s_loss() {
        let logs = Logs::parse(LIST, PATTERNS);
        let by_hand = logs.by_hand(&packaged());
        assert!(by_hand.lacks("ovs-vswitchd", &logs).is_empty());
        let fresh =
            Logs::parse(&LIST.replace("DBG    (rate limiting disabled)", "INFO"), &PATTERNS.replace("  twice", ""));
        let lacks: Vec<_> =
            by_hand.lacks("x", &fresh).into_iter().map(|lack| (lack.command, lack.arguments.join(" "))).collect();
        let set = |command: &str, arguments: &str| (command.to_owned(), arguments.to_owned());
        assert_eq!(
            lacks,
            [
                set("vlog/set", "bridge:file:DBG"),
                set("vlog/set", "PATTERN:file:%m  twice"),
                set("vlog/disable-rate-limit", "bridge")
            ]
        );
        let other = Logs::parse(&LIST.replace("bridge", "other "), PATTERNS);
        assert!(by_hand.lacks("x", &other).is_empty());
    }

    #[test]
    fn lines_of_another_form_are_passed_over() {
        for text in
            ["", "x", "console syslog file\n", "a OFF OFF\n", "a OFF OFF QUIET\n", "FILE\n", "FILE x", "FILE  none y"]
        {
            assert_eq!(Logs::parse(text, text), Logs::default(), "{text}");
        }
    }
}
