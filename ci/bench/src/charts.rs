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

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Draws each chart for which there are results.
pub fn draw(report: &Report, conditions: &str, folder: &Path) -> Result<Vec<Chart>> {
    let mut charts = Vec::new();
    for (direction, file) in [
        (Direction::Up, "guest-to-host.svg"),
        (Direction::Down, "host-to-guest.svg"),
        (Direction::Host, "host-to-host.svg"),
    ] {
        let lines = lines(report, direction);
        if lines.is_empty() {
            continue;
        }
        let title = format!("Throughput {}", direction.name());
        let path = folder.join(file);
        let area = SVGBackend::new(&path, SIZE).into_drawing_area();
        draw_streams(&area, &title, conditions, &lines)
            .map_err(|error| anyhow!("{} cannot be drawn: {error}", path.display()))?;
        charts.push(Chart { title, file });
    }
    let trips: Vec<_> = report
        .trips
        .iter()
        .filter(|row| row.is_measured())
        .collect();
    if !trips.is_empty() {
        let trips = trips.iter().map(|row| {
            let [median, p99, p999, _] = row.times.each_ref().map(|times| times.median() / 1e3);
            (row.trip.to_string(), [median, p99, p999])
        });
        let trips: Vec<_> = trips.collect();
        let (title, file) = ("Round-trip time".to_owned(), "round-trips.svg");
        let path = folder.join(file);
        let height = 3 * HEADER + LINE * i32::try_from(trips.len())?;
        let area = SVGBackend::new(&path, (SIZE.0, height.unsigned_abs())).into_drawing_area();
        draw_trips(&area, &title, conditions, &trips)
            .map_err(|error| anyhow!("{} cannot be drawn: {error}", path.display()))?;
        charts.push(Chart { title, file });
    }
    Ok(charts)
}

/// The name of a way, and its rate in MB/s at each size.
type Line = (&'static str, Vec<(f64, f64)>);

fn lines(report: &Report, direction: Direction) -> Vec<Line> {
    let mut lines: Vec<Line> = Vec::new();
    for row in &report.streams {
        if row.case.direction != direction || !row.is_measured() {
            continue;
        }
        let point = (row.case.record_size as f64, row.rate.median() / 1e6);
        let name = row.case.way.name();
        match lines.iter_mut().find(|(other, _)| *other == name) {
            Some((_, points)) => points.push(point),
            None => lines.push((name, vec![point])),
        }
    }
    lines
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
    let title = format!("{title}: medians, both axes logarithmic");
    let body = head(area, &title, conditions)?;
    let (plot, legend) = body.split_horizontally(SIZE.0.cast_signed() - LEGEND);
    let points = || lines.iter().flat_map(|(_, points)| points);
    let rates = range(points().map(|point| point.1), 1.3);
    let mut sizes: Vec<_> = points().map(|point| point.0).collect();
    sizes.sort_by(f64::total_cmp);
    sizes.dedup();
    let ticks = decades(&rates);
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
        .y_desc("MB/s (10⁶ bytes of payload a second)")
        .x_label_formatter(&|size| bytes(*size))
        .label_style((FONT, 13))
        .axis_desc_style((FONT, 14))
        .draw()?;
    for (number, (name, points)) in lines.iter().enumerate() {
        let colour = COLOURS[number % COLOURS.len()];
        chart.draw_series(LineSeries::new(
            points.iter().copied(),
            colour.stroke_width(2),
        ))?;
        for &point in points {
            let place = chart.plotting_area().map_coordinate(&point);
            area.draw(&mark(number, place, colour))?;
        }
        let y = 20 + LINE * i32::try_from(number).unwrap_or_default();
        legend.draw(&PathElement::new([(6, y), (34, y)], colour.stroke_width(2)))?;
        legend.draw(&mark(number, (20, y), colour))?;
        legend.draw(&Text::new((*name).to_owned(), (42, y - 7), (FONT, 14)))?;
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
    trips: &[(String, [f64; 3])],
) -> Result<(), Failure<'a>> {
    const NAMES: [&str; 3] = ["median", "99 %", "99.9 %"];
    let title = format!("{title}: medians of the rounds, logarithmic");
    let body = head(area, &title, conditions)?;
    let (legend, plot) = body.split_vertically(LINE + 8);
    let times = range(
        trips.iter().flat_map(|(_, times)| times.iter().copied()),
        1.3,
    );
    let ticks = decades(&times);
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
        let grey = RGBColor(190, 190, 190);
        chart.draw_series(LineSeries::new(
            times.iter().map(|&time| (time, y)),
            grey.stroke_width(2),
        ))?;
        for (which, &time) in times.iter().enumerate() {
            let place = chart.plotting_area().map_coordinate(&(time, y));
            area.draw(&mark(which, place, COLOURS[which]))?;
        }
        let (_, y) = chart.plotting_area().map_coordinate(&(times[0], y));
        area.draw(&Text::new(name.clone(), (16, y - 7), (FONT, 13)))?;
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
