//! The machine's own apt sources: where the lab takes its Debian mirror from, so that no host is named in this repository.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{bail, Context, Result};

/// One `deb` entry of the machine's apt configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// Base of the archive, such as the address of a Debian mirror.
    pub uri: String,
    /// Suites, such as `bookworm`.
    pub suites: Vec<String>,
    /// Components, such as `main`.
    pub components: Vec<String>,
}

/// Parses the deb822 format (`*.sources`, see sources.list(5)). Disabled stanzas and `deb-src` are left out.
pub fn parse_deb822(text: &str) -> Vec<Source> {
    let mut sources = Vec::new();
    let mut fields: Vec<(String, String)> = Vec::new();
    let flush = |fields: &mut Vec<(String, String)>, sources: &mut Vec<Source>| {
        let words = |key: &str| -> Vec<String> {
            let found = fields.iter().find(|(k, _)| k.eq_ignore_ascii_case(key));
            found.map(|(_, v)| v.split_whitespace().map(str::to_owned).collect()).unwrap_or_default()
        };
        let disabled = words("Enabled").first().is_some_and(|w| matches!(w.as_str(), "no" | "false" | "0"));
        if !disabled && words("Types").iter().any(|t| t == "deb") {
            for uri in words("URIs") {
                sources.push(Source { uri, suites: words("Suites"), components: words("Components") });
            }
        }
        fields.clear();
    };
    for line in text.lines().map(str::trim_end) {
        if line.starts_with('#') {
            continue;
        }
        if line.is_empty() {
            flush(&mut fields, &mut sources);
        } else if line.starts_with([' ', '\t']) {
            if let Some((_, value)) = fields.last_mut() {
                value.push(' ');
                value.push_str(line.trim());
            }
        } else if let Some((key, value)) = line.split_once(':') {
            fields.push((key.trim().to_owned(), value.trim().to_owned()));
        }
    }
    flush(&mut fields, &mut sources);
    sources
}

/// Parses the one-line format (`sources.list`): `deb [options] uri suite component...`.
pub fn parse_one_line(text: &str) -> Vec<Source> {
    let mut sources = Vec::new();
    for line in text.lines() {
        let line = line.split('#').next().unwrap_or_default().trim();
        let Some(rest) = line.strip_prefix("deb").filter(|r| r.starts_with([' ', '\t'])) else { continue };
        let rest = rest.trim_start();
        let rest = if rest.starts_with('[') { rest.split_once(']').map_or("", |(_, r)| r) } else { rest };
        let mut words = rest.split_whitespace().map(str::to_owned);
        if let (Some(uri), Some(suite)) = (words.next(), words.next()) {
            sources.push(Source { uri, suites: vec![suite], components: words.collect() });
        }
    }
    sources
}

/// Reads `/etc/apt/sources.list` and everything in `/etc/apt/sources.list.d`.
pub fn read_machine() -> Result<Vec<Source>> {
    let mut sources = Vec::new();
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    if let Ok(entries) = fs::read_dir("/etc/apt/sources.list.d") {
        files.extend(entries.flatten().map(|e| e.path()));
    }
    files.sort();
    for file in files.iter().filter(|f| f.is_file()) {
        let text = fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
        match file.extension().and_then(|e| e.to_str()) {
            Some("list") => sources.extend(parse_one_line(&text)),
            Some("sources") => sources.extend(parse_deb822(&text)),
            _ => {}
        }
    }
    Ok(sources)
}

/// The archive that carries the machine's own release (`codename`, component `main`), as debootstrap wants it.
///
/// `mirror+file:` lists (Debian's cloud images) are followed to their first line.
pub fn mirror(sources: &[Source], codename: &str) -> Result<String> {
    let fits = |s: &&Source| s.suites.iter().any(|x| x == codename) && s.components.iter().any(|c| c == "main");
    let Some(source) = sources.iter().find(fits) else {
        bail!(
            "no apt source carries {codename} main: the lab takes its mirror from there; \
             add one to /etc/apt/sources.list.d"
        );
    };
    match source.uri.strip_prefix("mirror+file:") {
        Some(path) => first_of_list(Path::new(path)),
        None => Ok(source.uri.clone()),
    }
}

fn first_of_list(path: &Path) -> Result<String> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read the mirror list {}", path.display()))?;
    let first = text.lines().map(str::trim).find(|l| !l.is_empty() && !l.starts_with('#'));
    let first = first.and_then(|l| l.split_whitespace().next());
    first.map(str::to_owned).with_context(|| format!("{} lists no mirror", path.display()))
}

/// `VERSION_CODENAME` of `/etc/os-release`.
pub fn codename() -> Result<String> {
    let text = fs::read_to_string("/etc/os-release").context("cannot read /etc/os-release")?;
    let line = text.lines().find_map(|l| l.strip_prefix("VERSION_CODENAME="));
    line.map(|l| l.trim_matches('"').to_owned())
        .context("/etc/os-release has no VERSION_CODENAME: not a Debian machine?")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deb822_stanzas_comments_and_continuations() {
        let text = "# a comment\nTypes: deb\n# another\nURIs: http://mirror.invalid/debian\nSuites: bookworm\n bookworm-updates\nComponents: main\n\nTypes: deb-src\nURIs: http://src.invalid\nSuites: bookworm\nComponents: main\n\nEnabled: no\nTypes: deb\nURIs: http://off.invalid\nSuites: bookworm\nComponents: main\n";
        let sources = parse_deb822(text);
        assert_eq!(sources.len(), 1);
        assert_eq!(sources[0].suites, ["bookworm", "bookworm-updates"]);
        assert_eq!(mirror(&sources, "bookworm").unwrap(), "http://mirror.invalid/debian");
        assert!(mirror(&sources, "trixie").is_err());
    }

    #[test]
    fn one_line_with_options() {
        let text = "deb [arch=amd64 signed-by=/x y] http://a.invalid/debian bookworm main contrib # c\ndeb-src http://b.invalid s main\n#deb http://c.invalid s main\n";
        let sources = parse_one_line(text);
        assert_eq!(sources.len(), 1);
        assert_eq!(sources[0].uri, "http://a.invalid/debian");
        assert_eq!(sources[0].components, ["main", "contrib"]);
    }
}
