//! The verbs of the program. One file a verb; only `output` prints.
//!
//! 1. Exit codes: 0 ok, 1 failed, 2 the command line is wrong; `check` has more, see its help.
//! 2. Only the public interface of the library is used.
//! 3. Standard output is data; messages for people go to standard error.

use std::process::ExitCode;

use clap::{Args, Command, CommandFactory, FromArgMatches, Parser, Subcommand};

mod access;
mod blocks;
mod check;
mod client;
mod clone;
mod convert;
mod create;
#[cfg(feature = "fuse")]
mod daemon;
mod dedupe;
mod df;
mod differ;
mod export;
mod failure;
mod grow;
mod identity;
mod image;
mod import;
mod info;
mod inspect;
mod logging;
#[cfg(feature = "fuse")]
mod mount;
mod mounts;
#[cfg(feature = "fuse")]
mod options;
mod output;
mod parts;
mod scrub;
mod sharing;
mod size;
mod target;
mod tree;
mod umount;
mod unnamed;
mod warn;

use failure::Failure;
use output::Output;

const FAILED: u8 = 1;
const USAGE: u8 = 2;

/// A datastore for virtual disk images in which a copy is a clone.
#[derive(Debug, Parser)]
#[command(name = "nodupe", version)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
    #[command(flatten)]
    global: Global,
}

#[derive(Debug, Args)]
struct Global {
    /// Print data and errors only
    #[arg(short, long, global = true)]
    quiet: bool,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Create(create::Create),
    #[cfg(feature = "fuse")]
    Mount(mount::Mount),
    Umount(umount::Umount),
    Clone(clone::Clone),
    Convert(convert::Convert),
    Dedupe(dedupe::Dedupe),
    Df(df::Df),
    Export(export::Export),
    Grow(grow::Grow),
    Import(import::Import),
    Info(info::Info),
    Inspect(inspect::Inspect),
    Check(check::Check),
    Scrub(scrub::Scrub),
}

/// The verbs by what they are for, as the top-level help shows them.
const GROUPS: &[(&str, &[&str])] = &[
    ("Set up", &["create", "mount", "umount", "grow"]),
    ("Every day", &["clone", "dedupe", "df", "info"]),
    ("Images", &["import", "inspect", "convert", "export"]),
    ("Trust", &["check", "scrub"]),
];

const EXAMPLE: &str = "\
Examples:
  nodupe mount --create ./pool.nodupe ./datastore
  cp gold.raw ./datastore/ && cp ./datastore/gold.raw ./datastore/vm-1.raw
  nodupe df";

/// Parses the command line, runs the verb and says how it went.
pub(super) fn run() -> ExitCode {
    let cli = match command().try_get_matches() {
        Ok(matches) => Cli::from_arg_matches(&matches),
        Err(error) => Err(error),
    };
    let cli = match cli {
        Ok(cli) => cli,
        Err(error) => {
            output::usage(&error);
            // Help and version come this way too, with 0.
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(USAGE));
        }
    };
    let service = match &cli.verb {
        #[cfg(feature = "fuse")]
        Verb::Mount(args) => (args.is_service(), args.is_background()),
        _ => (false, false),
    };
    logging::init(service.0, service.1);
    match dispatch(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            output::failure(&failure);
            let code = if failure.usage { USAGE } else { FAILED };
            ExitCode::from(failure.code.unwrap_or(code))
        }
    }
}

fn dispatch(cli: &Cli) -> Result<(), Failure> {
    let output = Output {
        quiet: cli.global.quiet,
    };
    match &cli.verb {
        Verb::Create(args) => create::run(args, output),
        #[cfg(feature = "fuse")]
        Verb::Mount(args) => mount::run(args, output),
        Verb::Umount(args) => umount::run(args, output),
        Verb::Clone(args) => clone::run(args, output),
        Verb::Convert(args) => convert::run(args, output),
        Verb::Dedupe(args) => dedupe::run(args, output),
        Verb::Df(args) => df::run(args, output),
        Verb::Export(args) => export::run(args, output),
        Verb::Grow(args) => grow::run(args, output),
        Verb::Import(args) => import::run(args, output),
        Verb::Info(args) => info::run(args, output),
        Verb::Inspect(args) => inspect::run(args, output),
        Verb::Check(args) => check::run(args, output),
        Verb::Scrub(args) => scrub::run(args, output),
    }
}

/// The command line with the verbs of its help in groups, which clap cannot do by itself.
fn command() -> Command {
    let command = Cli::command();
    let mut verbs = String::new();
    for (title, names) in GROUPS {
        verbs.push_str(&format!("\n{title}:\n"));
        for name in *names {
            // Without the feature `fuse` there is no `mount`.
            let Some(verb) = command.find_subcommand(name) else {
                continue;
            };
            let about = verb
                .get_about()
                .map(ToString::to_string)
                .unwrap_or_default();
            verbs.push_str(&format!("  {name:<8}{about}\n"));
        }
    }
    command
        .help_template(format!(
            "{{about-with-newline}}\n{{usage-heading}} {{usage}}\n{verbs}\nOptions:\n{{options}}\n\n{EXAMPLE}\n"
        ))
        .disable_help_subcommand(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_sound_and_every_verb_is_in_a_group() {
        command().debug_assert();
        let grouped: Vec<&str> = GROUPS.iter().flat_map(|group| group.1).copied().collect();
        let command = Cli::command();
        let verbs: Vec<&str> = command.get_subcommands().map(Command::get_name).collect();
        for verb in verbs {
            assert!(grouped.contains(&verb), "{verb}");
        }
        for verb in command.get_subcommands() {
            assert!(verb.get_after_help().is_some(), "{}", verb.get_name());
        }
    }
}
