// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The results as SVG charts: throughput over the size of records, and round-trip times. The viewer
//! of an SVG file supplies the fonts, so no fonts are needed here.

use std::path::Path;

use anyhow::{Result, anyhow};
use indicatif::BinaryBytes;
use plotters::coord::Shift;
use plotters::prelude::*;

use super::case::Direction;
use super::report::Report;
use super::spread::{Spread, range_name};
use super::stream::mib;

/// A chart that was drawn.
pub struct Chart {
    /// The title of the chart.
    pub title: String,
    /// The name of its file in the folder of the results.
    pub file: &'static str,
}

/// Colours that colour-blind readers can tell apart (Okabe and Ito), and two more.
const COLOURS: [RGBColor; 10] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(0, 0, 0),
    RGBColor(150, 120, 30),
    RGBColor(120, 60, 160),
    RGBColor(130, 130, 130),
];
const FONT: &str = "sans-serif";
/// Sizes in pixels: of a stream chart, of its legend, of one line of text, and of the header.
const SIZE: (u32, u32) = (1000, 560);
const LEGEND: i32 = 210;
const LINE: i32 = 22;
const HEADER: i32 = 56;
/// Greatest number of characters of a failure's reason. `results.md` has all of it.
const REASON: usize = 110;

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Draws each chart for which there are results.
pub fn draw(report: &Report, conditions: &str, folder: &Path) -> Result<Vec<Chart>> {
    let mut charts = Vec::new();
    let range = range_name(report.took.1);
    for (direction, file) in [
        (Direction::Up, "guest-to-host.svg"),
        (Direction::Down, "host-to-guest.svg"),
        (Direction::Host, "host-to-host.svg"),
    ] {
        let lines = lines(report, direction);
        if lines.iter().all(|line| line.points.is_empty()) {
            continue;
        }
        let title = format!("Throughput {}", direction.name());
        let text = format!("{title}: medians, with bars for {range}; both axes logarithmic");
        let path = folder.join(file);
        let failures: usize = lines.iter().map(|line| line.failed.len()).sum();
        let height = SIZE.1.cast_signed() + LINE * i32::try_from(failures)?;
        let area = SVGBackend::new(&path, (SIZE.0, height.unsigned_abs())).into_drawing_area();
        draw_streams(&area, &text, conditions, &lines)
            .map_err(|error| anyhow!("{} cannot be drawn: {error}", path.display()))?;
        charts.push(Chart { title, file });
    }
    let trips = trips(report);
    if trips.iter().any(|(_, result)| result.is_ok()) {
        let (title, file) = ("Round-trip time".to_owned(), "round-trips.svg");
        let text = format!("{title}: medians of the rounds, with bars for {range}; logarithmic");
        let path = folder.join(file);
        let height = 3 * HEADER + LINE * i32::try_from(trips.len())?;
        let area = SVGBackend::new(&path, (SIZE.0, height.unsigned_abs())).into_drawing_area();
        draw_trips(&area, &text, conditions, &trips)
            .map_err(|error| anyhow!("{} cannot be drawn: {error}", path.display()))?;
        charts.push(Chart { title, file });
    }
    Ok(charts)
}

/// The results of one way in one direction.
struct Line {
    name: &'static str,
    points: Vec<Point>,
    /// The sizes of records that failed, with the reasons.
    failed: Vec<(f64, String)>,
}

/// The result for one size of records: the median rate and its range, in MiB/s.
struct Point {
    size: f64,
    rate: f64,
    range: [f64; 2],
}

fn lines(report: &Report, direction: Direction) -> Vec<Line> {
    let mut lines: Vec<Line> = Vec::new();
    for row in &report.streams {
        if row.case.direction != direction {
            continue;
        }
        let name = row.case.way.name();
        let line = match lines.iter().position(|line| line.name == name) {
            Some(place) => &mut lines[place],
            None => {
                lines.push(Line {
                    name,
                    points: Vec::new(),
                    failed: Vec::new(),
                });
                lines.last_mut().expect("a line was just pushed")
            }
        };
        let size = row.case.record_size as f64;
        if let Some(failure) = &row.failure {
            line.failed.push((size, reason(failure)));
        } else if row.is_measured() {
            line.points.push(Point {
                size,
                rate: mib(row.rate.median()),
                range: row.rate.range().map(mib),
            });
        }
    }
    lines.retain(|line| !line.points.is_empty() || !line.failed.is_empty());
    lines
}

/// The times of one kind of round trip, in microseconds.
struct Times {
    /// The median, and the quantiles of the tail that enough trips bear.
    figures: [Option<f64>; 3],
    /// The range of the median.
    range: [f64; 2],
}

/// Returns each kind of round trip with its times, or with the reason why it failed.
fn trips(report: &Report) -> Vec<(String, Result<Times, String>)> {
    let rows = report.trips.iter();
    let rows = rows.filter(|row| row.is_measured() || row.failure.is_some());
    let rows = rows.map(|row| {
        let result = match &row.failure {
            Some(failure) => Err(reason(failure)),
            None => {
                let [median, p99, p999, _] = row.medians();
                let range = Spread::range(&row.times[0]).map(|time| time / 1e3);
                Ok(Times {
                    figures: [median, p99, p999],
                    range,
                })
            }
        };
        (row.trip.to_string(), result)
    });
    rows.collect()
}

/// Shortens the reason of a failure to a length that fits into a chart.
fn reason(failure: &str) -> String {
    match failure.char_indices().nth(REASON) {
        Some((end, _)) => format!("{}…", &failure[..end]),
        None => failure.to_owned(),
    }
}

/// Returns the range from the least to the greatest number, widened by a factor at both ends.
fn range(figures: impl Iterator<Item = f64> + Clone, factor: f64) -> std::ops::Range<f64> {
    let least = figures.clone().fold(f64::INFINITY, f64::min);
    let most = figures.fold(0.0, f64::max);
    least / factor..most * factor
}

/// Returns the powers of ten in a range, with their doubles and fivefolds.
fn decades(range: &std::ops::Range<f64>) -> Vec<f64> {
    let decades = -3..8;
    let all = decades.flat_map(|power| [1.0, 2.0, 5.0].map(|part| part * 10_f64.powi(power)));
    all.filter(|figure| range.contains(figure)).collect()
}

/// Draws the title and the conditions, and returns the area below.
fn head<'a>(area: &Area<'a>, title: &str, conditions: &str) -> Result<Area<'a>, Failure<'a>> {
    area.fill(&WHITE)?;
    area.draw(&Text::new(title.to_owned(), (16, 10), (FONT, 20)))?;
    area.draw(&Text::new(conditions.to_owned(), (16, 34), (FONT, 13)))?;
    Ok(area.split_vertically(HEADER).1)
}

type Failure<'a> = DrawingAreaErrorKind<<SVGBackend<'a> as DrawingBackend>::ErrorType>;

fn draw_streams<'a>(
    area: &Area<'a>,
    title: &str,
    conditions: &str,
    lines: &[Line],
) -> Result<(), Failure<'a>> {
    let body = head(area, title, conditions)?;
    let (body, notes) = body.split_vertically(SIZE.1.cast_signed() - HEADER);
    let (plot, legend) = body.split_horizontally(SIZE.0.cast_signed() - LEGEND);
    let points = || lines.iter().flat_map(|line| &line.points);
    let rates = range(points().flat_map(|point| point.range), 1.3);
    let failed = lines.iter().flat_map(|line| &line.failed);
    let mut sizes: Vec<_> = points().map(|point| point.size).collect();
    sizes.extend(failed.map(|(size, _)| size));
    sizes.sort_by(f64::total_cmp);
    sizes.dedup();
    let (ticks, lowest) = (decades(&rates), rates.start);
    let mut chart = ChartBuilder::on(&plot)
        .margin(8)
        .x_label_area_size(48)
        .y_label_area_size(72)
        .build_cartesian_2d(
            range(sizes.iter().copied(), 1.4)
                .log_scale()
                .with_key_points(sizes.clone()),
            rates.log_scale().with_key_points(ticks),
        )?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .x_labels(sizes.len())
        .y_labels(40)
        .x_desc("payload of a record")
        .y_label_formatter(&|rate| figure(*rate))
        .y_desc("MiB of payload a second")
        .x_label_formatter(&|size| bytes(*size))
        .label_style((FONT, 13))
        .axis_desc_style((FONT, 14))
        .draw()?;
    let mut failures = 0;
    for (number, line) in lines.iter().enumerate() {
        let (name, colour) = (line.name, COLOURS[number % COLOURS.len()]);
        chart.draw_series(LineSeries::new(
            line.points.iter().map(|point| (point.size, point.rate)),
            colour.stroke_width(2),
        ))?;
        for point in &line.points {
            let bar = point.range.map(|rate| (point.size, rate));
            chart.draw_series(LineSeries::new(bar, colour.stroke_width(1)))?;
            let place = (point.size, point.rate);
            let place = chart.plotting_area().map_coordinate(&place);
            area.draw(&mark(number, place, colour))?;
        }
        for (size, reason) in &line.failed {
            // Each failure has a line above the axis, and another one with its reason below the
            // chart.
            let (x, y) = chart.plotting_area().map_coordinate(&(*size, lowest));
            let style = TextStyle::from((FONT, 11)).color(&colour);
            let place = (x - 14, y - 14 - 12 * failures);
            area.draw(&Text::new("failed", place, style.clone()))?;
            let text = format!("failed: {name}, {}: {reason}", bytes(*size));
            let place = (16, LINE * failures);
            notes.draw(&Text::new(
                text,
                place,
                (FONT, 13).into_text_style(&notes).color(&colour),
            ))?;
            failures += 1;
        }
        let y = 20 + LINE * i32::try_from(number).unwrap_or_default();
        legend.draw(&PathElement::new([(6, y), (34, y)], colour.stroke_width(2)))?;
        legend.draw(&mark(number, (20, y), colour))?;
        legend.draw(&Text::new(name.to_owned(), (42, y - 7), (FONT, 14)))?;
    }
    area.present()
}

/// Returns the marker of a line. Neighbouring lines have different shapes, because lines can cover
/// each other.
fn mark<'a>(
    number: usize,
    place: (i32, i32),
    colour: RGBColor,
) -> DynElement<'a, SVGBackend<'a>, (i32, i32)> {
    match number % 4 {
        0 => Circle::new(place, 4, colour.filled()).into_dyn(),
        1 => TriangleMarker::new(place, 6, colour.filled()).into_dyn(),
        2 => Cross::new(place, 5, colour.stroke_width(2)).into_dyn(),
        _ => Circle::new(place, 5, colour.stroke_width(2)).into_dyn(),
    }
}

fn draw_trips<'a>(
    area: &Area<'a>,
    title: &str,
    conditions: &str,
    trips: &[(String, Result<Times, String>)],
) -> Result<(), Failure<'a>> {
    const NAMES: [&str; 3] = ["median", "99 %", "99.9 %"];
    let body = head(area, title, conditions)?;
    let (legend, plot) = body.split_vertically(LINE + 8);
    let measured = trips.iter().filter_map(|(_, times)| times.as_ref().ok());
    let figures = measured.flat_map(|times| {
        let figures = times.figures.iter().copied().flatten();
        figures.chain(times.range)
    });
    let times = range(figures, 1.3);
    let (ticks, shortest) = (decades(&times), times.start);
    let last = trips.len() as f64;
    let mut chart = ChartBuilder::on(&plot)
        .margin(8)
        .margin_right(24)
        .x_label_area_size(48)
        .margin_left(380)
        .build_cartesian_2d(times.clone().log_scale().with_key_points(ticks), last..0.0)?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .disable_y_mesh()
        .x_labels(40)
        .x_label_formatter(&|time| figure(*time))
        .x_desc("µs")
        .label_style((FONT, 13))
        .axis_desc_style((FONT, 14))
        .draw()?;
    for (number, (name, times)) in trips.iter().enumerate() {
        let y = number as f64 + 0.5;
        let (left, top) = chart.plotting_area().map_coordinate(&(shortest, y));
        area.draw(&Text::new(name.clone(), (16, top - 7), (FONT, 13)))?;
        let times = match times {
            Ok(times) => times,
            Err(reason) => {
                let text = format!("failed: {reason}");
                area.draw(&Text::new(text, (left + 8, top - 7), (FONT, 13)))?;
                continue;
            }
        };
        let grey = RGBColor(190, 190, 190);
        chart.draw_series(LineSeries::new(
            times.figures.iter().flatten().map(|&time| (time, y)),
            grey.stroke_width(2),
        ))?;
        let bar = times.range.map(|time| (time, y));
        chart.draw_series(LineSeries::new(bar, COLOURS[0].mix(0.4).stroke_width(7)))?;
        for (which, time) in times.figures.iter().enumerate() {
            let Some(time) = *time else {
                continue;
            };
            let place = chart.plotting_area().map_coordinate(&(time, y));
            area.draw(&mark(which, place, COLOURS[which]))?;
        }
        if let Some(longest) = times.figures.iter().flatten().copied().reduce(f64::max)
            && times.figures.contains(&None)
        {
            let (x, y) = chart.plotting_area().map_coordinate(&(longest, y));
            let text = "n too small for the rest";
            area.draw(&Text::new(text, (x + 12, y - 6), (FONT, 11)))?;
        }
    }
    for (which, name) in NAMES.iter().enumerate() {
        let x = 400 + 180 * i32::try_from(which).unwrap_or_default();
        legend.draw(&mark(which, (x, 14), COLOURS[which]))?;
        legend.draw(&Text::new((*name).to_owned(), (x + 14, 7), (FONT, 14)))?;
    }
    area.present()
}

/// Formats a number: three decimal places below 1, without zeros at the end, and none above.
fn figure(figure: f64) -> String {
    let places = if figure < 1.0 { 3 } else { 0 };
    let text = format!("{figure:.places$}");
    match text.contains('.') {
        true => text.trim_end_matches('0').to_owned(),
        false => text,
    }
}

/// Formats a size in bytes.
fn bytes(size: f64) -> String {
    let size = BinaryBytes(size as u64).to_string();
    size.replace(".00", "")
}

#[cfg(test)]
mod tests {
    use std::fs;

    use barlink_bench_load::Wait;
    use barlink_vm::broker::Transport;

    use super::super::case::Way;
    use super::super::plan::Plan;
    use super::super::scene::Conditions;
    use super::super::trip::Trip;
    use super::*;

    /// Returns a report of three rounds of two ways, one of which failed at 64 KiB, and in its
    /// round trip.
    fn report() -> Result<Report> {
        let conditions = Conditions {
            accelerator: "tcg",
            processor: String::new(),
            host_kernel: String::new(),
            qemu: String::new(),
            kernel: String::new(),
            cache_modes: Vec::new(),
            raw_cache_mode: String::new(),
            guest_cpus: 1,
            host_cpus: 1,
        };
        let sizes = [64, 64 << 10];
        let mut report = Report::new(conditions, Plan::new(&sizes, &[64], &[])?);
        report.took.1 = 3;
        let ways = [Way::Channel(Transport::Ivshmem), Way::Vsock];
        let up = |row: &super::super::stream::Row| row.case.direction == Direction::Up;
        report
            .streams
            .retain(|row| up(row) && ways.contains(&row.case.way));
        for row in &mut report.streams {
            row.records = 1;
            for rate in [100, 200, 400] {
                row.rate.add(f64::from(rate << 20));
            }
            let hangs = row.case.way == Way::Vsock && row.case.record_size > 64;
            row.failure = hangs.then(|| "the sender does not end".to_owned());
        }
        let trips = [
            Trip::Channels(Transport::Ivshmem, Wait::Sleep),
            Trip::Peer(Way::Vsock),
        ];
        report.trips.retain(|row| trips.contains(&row.trip));
        for row in &mut report.trips {
            // Of a few trips each: the median and the longest.
            for (which, time) in [(0, 150e3), (3, 900e3)] {
                row.times[which].add(time);
            }
            let fails = row.trip == Trip::Peer(Way::Vsock);
            row.failure = fails.then(|| "the device has ended".to_owned());
        }
        Ok(report)
    }

    #[test]
    fn charts_show_failures_and_small_counts() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let report = report()?;
        report.write(folder.path())?;
        let read = |name| fs::read_to_string(folder.path().join(name));
        let text = read("results.md")?;
        for cell in [
            "| 64.00 KiB | failed: the sender does not end |",
            "| MiB/s | all rounds |",
            "| 200 | 100 to 400 |",
            "| 150.0 | 150.0 to 150.0 | n too small | n too small | 900.0 |",
            "| vhost-device-vsock | failed: the device has ended |",
        ] {
            assert!(text.contains(cell), "no {cell} in {text}");
        }
        let streams = read("guest-to-host.svg")?;
        for note in [
            "failed: vhost-device-vsock, 64 KiB: the sender does not end",
            "with bars for all rounds",
        ] {
            assert!(streams.contains(note), "no {note} in {streams}");
        }
        let trips = read("round-trips.svg")?;
        for note in ["failed: the device has ended", "n too small for the rest"] {
            assert!(trips.contains(note), "no {note} in {trips}");
        }
        Ok(())
    }

    #[test]
    fn long_reasons_are_cut() {
        assert_eq!(reason("short"), "short");
        let long = reason(&"é".repeat(REASON + 1));
        assert_eq!(long.chars().count(), REASON + 1);
        assert!(long.ends_with('…'));
    }
}
