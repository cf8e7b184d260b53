//! Everything the program prints. Standard output is data, standard error is for people.
//!
//! 1. Data is written whole, once it is complete: a verb that fails prints none of it.
//! 2. A reader that has gone away is not an error: the program exits 0.
//! 3. Names from the outside are shown without control characters.

use std::io::{self, IsTerminal, Write};
use std::path::Path;
use std::process;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::Value;

use super::failure::Failure;

/// How the user wants to be told.
#[derive(Clone, Copy, Debug)]
pub(super) struct Output {
    /// Nothing but data and errors.
    pub(super) quiet: bool,
}

impl Output {
    /// Prints the data of a verb, text that ends in a newline.
    pub(super) fn data(self, text: &str) {
        write_data(text);
    }

    /// Prints one JSON document. The object gets the key `schema`, which counts up when a key
    /// changes its meaning or goes away; new keys leave it as it is.
    pub(super) fn json(self, mut value: Value) {
        value["schema"] = Value::from(1);
        write_data(&format!("{value:#}\n"));
    }

    /// Says on standard output what a verb has done.
    pub(super) fn done(self, text: &str) {
        if !self.quiet {
            write_data(&format!("{text}\n"));
        }
    }

    /// Tells something worth knowing on standard error.
    pub(super) fn note(self, text: &str) {
        if !self.quiet {
            write_message(&format!("nodupe: {text}\n"));
        }
    }

    /// A bar on standard error for work of `total` units, if that is a terminal. Whoever asks
    /// for it clears it when the work is done. `bytes`: the units are bytes.
    pub(super) fn progress(self, what: &'static str, total: u64, bytes: bool) -> ProgressBar {
        if self.quiet || !io::stderr().is_terminal() {
            return ProgressBar::hidden();
        }
        let template = if bytes {
            "{msg} [{bar:40}] {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta}"
        } else {
            "{msg} [{bar:40}] {percent}% {eta}"
        };
        let style = ProgressStyle::with_template(template)
            .unwrap_or_else(|_| ProgressStyle::default_bar())
            .progress_chars("#>-");
        const DRAWS_PER_SECOND: u8 = 5;
        let target = ProgressDrawTarget::stderr_with_hz(DRAWS_PER_SECOND);
        let bar = ProgressBar::with_draw_target(Some(total), target)
            .with_style(style)
            .with_message(what);
        bar.enable_steady_tick(Duration::from_millis(500));
        bar
    }
}

/// Prints why a verb failed, and what to do next.
pub(super) fn failure(failure: &Failure) {
    if failure.chain.is_empty() {
        return;
    }
    let mut text = format!("nodupe: {}\n", failure.chain.join(": "));
    for hint in &failure.hints {
        text.push_str(&format!("  {hint}\n"));
    }
    write_message(&text);
}

/// Prints what the parser of the command line has to say: help, or what is wrong.
pub(super) fn usage(error: &clap::Error) {
    if error.use_stderr() {
        let text = error.to_string();
        let text = text.strip_prefix("error: ").unwrap_or(&text);
        write_message(&format!("nodupe: {text}"));
    } else {
        // Nothing can be told about a failure to tell.
        drop(error.print());
    }
}

fn write_data(text: &str) {
    let mut stdout = io::stdout().lock();
    let written = stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush());
    match written {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => process::exit(0),
        Err(error) => {
            failure(&Failure::new("cannot write the output").because(&error));
            process::exit(1);
        }
    }
}

fn write_message(text: &str) {
    // Nothing can be told about a failure to tell.
    drop(io::stderr().lock().write_all(text.as_bytes()));
}

/// A path for people: never anything that moves the cursor or ends the line.
pub(super) fn show(path: &Path) -> String {
    clean(&path.to_string_lossy())
}

/// As [`show`], for any text from the outside.
pub(super) fn clean(text: &str) -> String {
    // What moves the cursor, and what turns the direction of what follows.
    let hidden = |c: char| {
        c.is_control()
            || matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    text.chars()
        .map(|c| if hidden(c) { '?' } else { c })
        .collect()
}

/// Where a column's text goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Align {
    Left,
    Right,
}

/// A table with a header, columns two spaces apart.
#[derive(Debug)]
pub(super) struct Table {
    columns: Vec<(&'static str, Align)>,
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(super) fn new(columns: &[(&'static str, Align)]) -> Self {
        Self {
            columns: columns.to_vec(),
            rows: Vec::new(),
        }
    }

    /// Adds a row: one cell a column.
    pub(super) fn row(&mut self, cells: Vec<String>) {
        assert_eq!(cells.len(), self.columns.len(), "one cell a column");
        self.rows.push(cells);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    pub(super) fn render(&self) -> String {
        let header: Vec<String> = self.columns.iter().map(|column| column.0.into()).collect();
        let lines = || std::iter::once(&header).chain(&self.rows);
        let widths: Vec<usize> = (0..self.columns.len())
            .map(|index| lines().map(|row| width(&row[index])).max().unwrap_or(0))
            .collect();
        let mut text = String::new();
        for row in lines() {
            let mut line = String::new();
            for ((cell, width_max), column) in row.iter().zip(&widths).zip(&self.columns) {
                let pad = " ".repeat(width_max - width(cell));
                match column.1 {
                    Align::Left => line.push_str(&format!("{cell}{pad}  ")),
                    Align::Right => line.push_str(&format!("{pad}{cell}  ")),
                }
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

fn width(cell: &str) -> usize {
    cell.chars().count()
}

/// `facts` as aligned lines of name and value.
pub(super) fn list(facts: &[(&str, String)]) -> String {
    let longest = facts.iter().map(|fact| width(fact.0)).max().unwrap_or(0);
    facts
        .iter()
        .map(|(name, value)| format!("{name:<longest$}  {value}\n"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let mut table = Table::new(&[("NAME", Align::Left), ("SIZE", Align::Right)]);
        table.row(vec!["a".into(), "10 GiB".into()]);
        table.row(vec!["longer".into(), "0 B".into()]);
        assert_eq!(
            table.render(),
            "NAME      SIZE\na       10 GiB\nlonger     0 B\n"
        );
    }

    #[test]
    fn names_cannot_move_the_cursor() {
        assert_eq!(show(Path::new("a\x1b[2Jb\nc")), "a?[2Jb?c");
    }
}
