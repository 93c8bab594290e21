//! Formats text in columns.

/// Formats rows of equal length as a table. The first row is the header. Empty cells are shown as a dash.
pub(super) fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.first().map_or(0, Vec::len);
    let widths: Vec<_> = (0..columns)
        .map(|column| rows.iter().map(|row| row[column].chars().count().max(1)).max().unwrap_or(1))
        .collect();
    rows.iter()
        .map(|row| {
            let cells = row.iter().zip(&widths).map(|(cell, width)| {
                let cell = if cell.is_empty() { "-" } else { cell };
                format!("{cell:<width$}")
            });
            cells.collect::<Vec<_>>().join("   ").trim_end().to_owned() + "\n"
        })
        .collect()
}

#[cfg(test)]
mod tests {
    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let rows = [["A", "B"], ["long", ""], ["", "x"]].map(|row| row.map(str::to_owned).to_vec());
        assert_eq!(super::table(&rows), "A      B\nlong   -\n-      x\n");
    }
}
