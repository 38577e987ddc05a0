//! Commands of our programs that documents and their own help name: the program must take them.

use std::{fs, path::Path};

use clap::{Command, error::ErrorKind};

/// A command line of one of our programs, and where it stands.
#[derive(Clone, Debug)]
struct Named {
    place: String,
    /// From the program's name on.
    words: Vec<String>,
    /// Prose may leave out arguments, or name an option without its value.
    is_whole: bool,
}

/// Fails unless `command` takes each of its command lines in README.md, in `docs/` and in its own
/// help.
///
/// # Panics
/// It does not take one, or there is none.
pub fn assert_valid(command: &Command) {
    let named = [in_documents(command.get_name()), in_help(command, command.get_name())].concat();
    assert!(named.iter().any(|named| named.is_whole), "no command lines of {} found", command.get_name());
    let wrong: Vec<String> = named
        .iter()
        .filter_map(|Named { place, words, is_whole }| {
            let error = command.clone().try_get_matches_from(words).err()?;
            let is_wrong = match error.kind() {
                ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => false,
                ErrorKind::UnknownArgument | ErrorKind::InvalidSubcommand => true,
                _ => *is_whole,
            };
            is_wrong.then(|| format!("{place}: {}\n{error}", words.join(" ")))
        })
        .collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

fn in_documents(program: &str) -> Vec<Named> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let pages = fs::read_dir(root.join("docs")).expect("docs").flatten().map(|entry| entry.path());
    let pages = pages.filter(|path| path.extension().is_some_and(|end| end == "md"));
    pages
        .chain([root.join("README.md")])
        .flat_map(|path| {
            let text = fs::read_to_string(&path).expect("a page");
            in_page(&path.file_name().expect("a name").to_string_lossy(), &text, program)
        })
        .collect()
}

fn in_page(page: &str, text: &str, program: &str) -> Vec<Named> {
    let (mut found, mut prose, mut fence) = (Vec::new(), String::new(), None);
    // A line that ends with a backslash goes on.
    for line in text.replace("\\\n", " ").lines().map(str::trim_start) {
        match (line.strip_prefix("```"), fence) {
            (Some(kind), None) => fence = Some(kind == "console"),
            (Some(_), Some(_)) => fence = None,
            (None, Some(true)) => {
                let typed = line.strip_prefix("# ").or_else(|| line.strip_prefix("$ "));
                let words = typed.and_then(|line| of_program(line, program));
                found.extend(words.map(|words| Named { place: page.to_owned(), words, is_whole: true }));
            }
            (None, Some(false)) => {}
            (None, None) => prose.extend([line, " "]),
        }
    }
    found.extend(prose.split('`').skip(1).step_by(2).filter_map(|code| {
        // In a table a bar is escaped.
        let code = code.replace(['[', ']'], "").replace("\\|", "|");
        let words = of_program(&code, program)?;
        let says_what = words.get(1).is_some_and(|word| word.chars().any(char::is_lowercase));
        says_what.then(|| Named { place: page.to_owned(), words, is_whole: false })
    }));
    found
}

/// The examples in the help of `command` and below it.
fn in_help(command: &Command, path: &str) -> Vec<Named> {
    let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
    let examples = help.split_once("Examples:").map_or("", |(_, examples)| examples);
    let program = path.split(' ').next().unwrap_or(path);
    let mut found: Vec<Named> = examples
        .lines()
        .filter_map(|line| {
            // What it does may stand beside it.
            let line = line.trim().split("  ").next()?;
            Some(Named { place: format!("{path} --help"), words: of_program(line, program)?, is_whole: true })
        })
        .collect();
    for below in command.get_subcommands() {
        found.extend(in_help(below, &format!("{path} {}", below.get_name())));
    }
    found
}

/// The words from `program` on, if `line` runs it: by itself, with variables before it, or by another
/// program after `--`.
fn of_program(line: &str, program: &str) -> Option<Vec<String>> {
    let words = shlex::split(line)?;
    let is_program = |word: &String| word == program || word.ends_with(&format!("/{program}"));
    let runs_it = |at: &usize| {
        let before = &words[..*at];
        before.iter().all(|word| word.contains('=')) || before.last().is_some_and(|word| word == "--")
    };
    let at = (0..words.len()).find(|at| is_program(&words[*at]) && runs_it(at))?;
    let ends = |word: &&String| !matches!(word.as_str(), "|" | ">" | ">>" | "&&" | ";" | "&");
    let words = words[at..].iter().take_while(ends);
    // What the shell fills in is some word.
    let filled_in = |word: &str| if word.starts_with("$(") { "word".to_owned() } else { word.to_owned() };
    Some(words.map(|word| filled_in(word.split('|').next().unwrap_or(word))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_that_run_the_program_are_found_and_others_are_not() {
        let words = |line: &str| of_program(line, "watcher").map(|words| words.join(" "));
        for (line, wanted) in [
            ("watcher status -o json | jq '.pods[]'", "watcher status -o json"),
            (
                "NODE_NAME=a target/release/watcher run --node \"$(hostname)\"",
                "target/release/watcher run --node word",
            ),
            ("kubectl -n x exec daemonset/ztunnel -c watcher -- watcher status", "watcher status"),
            ("kubectl -n x exec daemonset/ztunnel -c watcher -- ztunnel status", ""),
            ("make watcher", ""),
            ("ztunnel status", ""),
        ] {
            assert_eq!(words(line).unwrap_or_default(), wanted, "{line}");
        }
    }

    #[test]
    fn consoles_are_taken_whole_and_prose_in_part() {
        let text = "Say `watcher run --pods` or\n`watcher COMMAND --help`.\n\n```console\n# watcher \\\n  status\nout\n```\n";
        let found = in_page("page", text, "watcher");
        let all: Vec<(String, bool)> =
            found.iter().map(|named| (named.words.join(" "), named.is_whole)).collect();
        assert_eq!(all, [("watcher status".to_owned(), true), ("watcher run --pods".to_owned(), false)]);
    }

    #[test]
    #[should_panic(expected = "unexpected argument '--pots'")]
    fn a_line_that_the_program_does_not_take_is_named() {
        let help = "Examples:\n  watcher --pots FILE   runs";
        assert_valid(&Command::new("watcher").after_help(help));
    }
}
