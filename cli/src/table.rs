//! Columns.

use anstyle::Style;

use crate::text::visible;

/// One place in a table.
#[derive(Debug, Clone)]
pub(crate) struct Cell {
    text: String,
    style: Style,
    to_the_right: bool,
}

impl Cell {
    /// Text of any origin.
    pub(crate) fn new(text: impl AsRef<str>) -> Self {
        Self { text: visible(text.as_ref()).into_owned(), style: Style::new(), to_the_right: false }
    }

    /// A number, or what stands for one.
    pub(crate) fn number(number: impl ToString) -> Self {
        Self { to_the_right: true, ..Self::new(number.to_string()) }
    }

    /// The same in this style.
    pub(crate) fn styled(self, style: Style) -> Self {
        Self { style, ..self }
    }
}

impl From<&str> for Cell {
    fn from(text: &str) -> Self {
        Self::new(text)
    }
}

/// Rows below a head. A table may be written in parts: later parts keep the widths of the first one, if they fit.
#[derive(Debug)]
pub(crate) struct Table {
    head: Vec<Cell>,
    widths: Vec<usize>,
    rows: Vec<Vec<Cell>>,
    head_written: bool,
}

impl Table {
    /// A table with these columns.
    pub(crate) fn new(head: impl IntoIterator<Item = Cell>) -> Self {
        let head: Vec<Cell> = head.into_iter().map(|cell| cell.styled(Style::new().bold())).collect();
        let widths = head.iter().map(|cell| cell.text.chars().count()).collect();
        Self { head, widths, rows: Vec::new(), head_written: false }
    }

    /// Adds a row of as many cells.
    pub(crate) fn row(&mut self, cells: impl IntoIterator<Item = Cell>) {
        self.rows.push(cells.into_iter().collect());
    }

    /// The text of the rows added since the last time, below the head the first time.
    pub(crate) fn take(&mut self, color: bool) -> String {
        let rows = std::mem::take(&mut self.rows);
        for row in &rows {
            for (width, cell) in self.widths.iter_mut().zip(row) {
                *width = (*width).max(cell.text.chars().count());
            }
        }
        let mut text = String::new();
        if !std::mem::replace(&mut self.head_written, true) {
            self.write(&self.head, color, &mut text);
        }
        for row in &rows {
            self.write(row, color, &mut text);
        }
        text
    }

    fn write(&self, row: &[Cell], color: bool, text: &mut String) {
        let last = row.len().saturating_sub(1);
        for (index, (cell, width)) in row.iter().zip(&self.widths).enumerate() {
            let gap = " ".repeat(width.saturating_sub(cell.text.chars().count()));
            let shown = paint(&cell.text, cell.style, color);
            match (cell.to_the_right, index == last) {
                (true, _) => text.extend([gap.as_str(), shown.as_str()]),
                (false, true) => text.push_str(&shown),
                (false, false) => text.extend([shown.as_str(), gap.as_str()]),
            }
            if index != last {
                text.push_str("  ");
            }
        }
        // Padding before empty cells would stand at the line's end.
        text.truncate(text.trim_end_matches(' ').len());
        text.push('\n');
    }
}

/// The text in a style, where there are colours.
pub(crate) fn paint(text: &str, style: Style, color: bool) -> String {
    if color && !style.is_plain() && !text.is_empty() { format!("{style}{text}{style:#}") } else { text.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_align_and_control_characters_do_not_pass() {
        let mut table = Table::new([Cell::from("NAME"), Cell::number("N"), Cell::from("LAST")]);
        table.row([Cell::from("a\u{1b}"), Cell::number(7), Cell::from("x")]);
        table.row([Cell::from("longer-name"), Cell::number(1234), Cell::from("")]);
        let expected = "NAME            N  LAST\na\\u{1b}         7  x\nlonger-name  1234\n";
        assert_eq!(table.take(false), expected);
        table.row([Cell::from("b"), Cell::number(1), Cell::from("y")]);
        assert_eq!(table.take(false), "b               1  y\n", "the head comes once");
    }

    #[test]
    fn colours_are_left_out_where_there_are_none() {
        let green = anstyle::AnsiColor::Green.on_default();
        assert_eq!(paint("ok", green, false), "ok");
        assert_eq!(paint("ok", green, true), "\u{1b}[32mok\u{1b}[0m");
    }
}
