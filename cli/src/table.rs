//! Columns, as many and as wide as a terminal has room for.

use anstyle::Style;
use unicode_width::UnicodeWidthStr;

use crate::text::{fit, visible};

/// What stands between two columns.
const GAP: usize = 2;

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

    fn width(&self) -> usize {
        self.text.width()
    }
}

/// A column, and what becomes of it where there is no room for all.
#[derive(Debug, Clone)]
pub(crate) struct Column {
    head: Cell,
    /// The higher, the sooner it is left out.
    rank: Option<u8>,
    /// How narrow it may become.
    narrowest: Option<usize>,
    width: usize,
}

impl Column {
    /// A column of texts, which is always there.
    pub(crate) fn new(name: &str) -> Self {
        Self::headed(Cell::new(name))
    }

    /// A column of numbers.
    pub(crate) fn number(name: &str) -> Self {
        Self::headed(Cell::number(name))
    }

    fn headed(head: Cell) -> Self {
        let head = head.styled(Style::new().bold());
        Self { width: head.width(), head, rank: None, narrowest: None }
    }

    /// It may be left out; of several the one with the highest rank first.
    pub(crate) fn optional(self, rank: u8) -> Self {
        Self { rank: Some(rank), ..self }
    }

    /// Its texts may be cut to this width.
    pub(crate) fn cut(self, narrowest: usize) -> Self {
        Self { narrowest: Some(narrowest), ..self }
    }

    fn least(&self) -> usize {
        self.narrowest.map_or(self.width, |narrowest| narrowest.max(self.head.width()).min(self.width))
    }
}

/// Rows below a head. A table may be written in parts: later parts keep the columns of the first one.
#[derive(Debug)]
pub(crate) struct Table {
    columns: Vec<Column>,
    /// The columns that are shown, once the head is written.
    shown: Option<Vec<usize>>,
    rows: Vec<Vec<Cell>>,
}

impl Table {
    /// A table with these columns.
    pub(crate) fn new(columns: impl IntoIterator<Item = Column>) -> Self {
        Self { columns: columns.into_iter().collect(), shown: None, rows: Vec::new() }
    }

    /// Adds a row of as many cells.
    pub(crate) fn row(&mut self, cells: impl IntoIterator<Item = Cell>) {
        self.rows.push(cells.into_iter().collect());
    }

    /// The text of the rows added since the last time, below the head the first time; no wider than `room`.
    pub(crate) fn take(&mut self, color: bool, room: Option<usize>) -> String {
        let rows = std::mem::take(&mut self.rows);
        for row in &rows {
            for (column, cell) in self.columns.iter_mut().zip(row) {
                column.width = column.width.max(cell.width());
            }
        }
        let head = self.shown.is_none();
        let shown = self.shown.take().unwrap_or_else(|| self.chosen(room));
        let widths = self.widths(&shown, room);
        let mut text = String::new();
        if head {
            let head = self.columns.iter().map(|column| column.head.clone()).collect::<Vec<_>>();
            write(&head, &shown, &widths, color, &mut text);
        }
        for row in &rows {
            write(row, &shown, &widths, color, &mut text);
        }
        self.shown = Some(shown);
        text
    }

    /// The columns for which there is room when each is as narrow as it may be.
    fn chosen(&self, room: Option<usize>) -> Vec<usize> {
        let mut shown: Vec<usize> = (0..self.columns.len()).collect();
        let Some(room) = room else { return shown };
        while total(shown.iter().map(|index| self.columns[*index].least())) > room {
            let ranked = shown.iter().filter_map(|index| self.columns[*index].rank.map(|rank| (rank, *index)));
            let Some((_, least_wanted)) = ranked.max() else { break };
            shown.retain(|index| *index != least_wanted);
        }
        shown
    }

    /// How wide each of these is: as wide as its widest cell, or what its share of the room is.
    fn widths(&self, shown: &[usize], room: Option<usize>) -> Vec<usize> {
        let of = |width: &dyn Fn(&Column) -> usize| shown.iter().map(|index| width(&self.columns[*index])).collect();
        let wanted: Vec<usize> = of(&|column| column.width);
        let Some(room) = room.filter(|room| total(wanted.iter().copied()) > *room) else { return wanted };
        let mut widths: Vec<usize> = of(&Column::least);
        let mut spare = room.saturating_sub(total(widths.iter().copied()));
        while spare > 0 {
            let before = spare;
            for (width, wanted) in widths.iter_mut().zip(&wanted) {
                if spare > 0 && *width < *wanted {
                    (*width, spare) = (*width + 1, spare - 1);
                }
            }
            if spare == before {
                break;
            }
        }
        widths
    }
}

/// How much room columns of these widths take.
fn total(widths: impl Iterator<Item = usize>) -> usize {
    let (count, sum) = widths.fold((0_usize, 0), |(count, sum), width| (count + 1, sum + width));
    sum + GAP * count.saturating_sub(1)
}

fn write(row: &[Cell], shown: &[usize], widths: &[usize], color: bool, text: &mut String) {
    let last = shown.len().saturating_sub(1);
    for (at, (index, width)) in shown.iter().zip(widths).enumerate() {
        let Some(cell) = row.get(*index) else { continue };
        let fitted = fit(&cell.text, *width);
        let gap = " ".repeat(width.saturating_sub(fitted.width()));
        let painted = paint(&fitted, cell.style, color);
        match (cell.to_the_right, at == last) {
            (true, _) => text.extend([gap.as_str(), painted.as_str()]),
            (false, true) => text.push_str(&painted),
            (false, false) => text.extend([painted.as_str(), gap.as_str()]),
        }
        if at != last {
            text.push_str(&" ".repeat(GAP));
        }
    }
    // Padding before empty cells would stand at the line's end.
    text.truncate(text.trim_end_matches(' ').len());
    text.push('\n');
}

/// The text in a style, where there are colours.
pub(crate) fn paint(text: &str, style: Style, color: bool) -> String {
    if color && !style.is_plain() && !text.is_empty() { format!("{style}{text}{style:#}") } else { text.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn columns_align_and_control_characters_do_not_pass() {
        let mut table = Table::new([Column::new("NAME"), Column::number("N"), Column::new("LAST")]);
        table.row([Cell::new("a\u{1b}"), Cell::number(7), Cell::new("x")]);
        table.row([Cell::new("longer-name"), Cell::number(1234), Cell::new("")]);
        let expected = "NAME            N  LAST\na\\u{1b}         7  x\nlonger-name  1234\n";
        assert_eq!(table.take(false, None), expected);
        table.row([Cell::new("b"), Cell::number(1), Cell::new("y")]);
        assert_eq!(table.take(false, None), "b               1  y\n", "the head comes once");
    }

    #[test]
    fn colours_are_left_out_where_there_are_none() {
        let green = anstyle::AnsiColor::Green.on_default();
        assert_eq!(paint("ok", green, false), "ok");
        assert_eq!(paint("ok", green, true), "\u{1b}[32mok\u{1b}[0m");
    }

    fn table() -> Table {
        let mut table = Table::new([
            Column::new("ID"),
            Column::new("KIND").cut(6),
            Column::new("QUEUE").optional(2),
            Column::number("TRIES").optional(3),
            Column::new("WHY").optional(1).cut(6),
        ]);
        let text = ["0123456789", "report.build.monthly", "default", "1/20", "no such month, or 日本語 one"];
        table.row(text.map(Cell::new));
        table
    }

    #[test]
    fn what_has_no_room_is_cut_and_then_left_out_in_its_order() {
        let shown = |room| table().take(false, room);
        assert!(shown(None).contains("report.build.monthly  default  1/20   no such month, or 日本語 one"));
        assert_eq!(shown(Some(200)), shown(None));
        let at_50 = "ID          KIND        QUEUE    TRIES  WHY\n0123456789  report.b…  default   1/20  no such…\n";
        assert_eq!(shown(Some(50)).lines().count(), at_50.lines().count());
        assert!(shown(Some(44)).contains("TRIES") && !shown(Some(40)).contains("TRIES"));
        assert!(shown(Some(40)).contains("QUEUE") && !shown(Some(30)).contains("QUEUE"));
        assert_eq!(shown(Some(19)), "ID          KIND\n0123456789  report…\n");
        assert_eq!(shown(Some(5)), "ID          KIND\n0123456789  repor…\n", "what identifies stays whole");
    }

    proptest! {
        /// No line is wider than the room, however little there is for what must be there, and later parts keep the columns.
        #[test]
        fn no_line_is_wider_than_its_room(room in 18_usize..120, more in "\\PC{0,60}") {
            let mut table = table();
            let first = table.take(false, Some(room));
            table.row(["0123456789", "k", "default", "1/20", &more].map(Cell::new));
            let second = table.take(false, Some(room));
            for line in first.lines().chain(second.lines()) {
                prop_assert!(line.width() <= room, "{} > {room}: {line:?}", line.width());
            }
        }
    }
}
