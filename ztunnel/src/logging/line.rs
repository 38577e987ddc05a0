//! No line of the log is longer than [`LONGEST`], whoever's words are in it.

use std::{borrow::Cow, fmt::Write as _, io};

use serde_json::{Map, Value, json};

use crate::config::LogFormat;

/// In bytes, with the newline.
pub(super) const LONGEST: usize = 4096;

/// Writes whole lines, each shortened where it is too long.
pub(super) struct BoundedLines<W> {
    pub writer: W,
    pub format: LogFormat,
}

impl<W: io::Write> io::Write for BoundedLines<W> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.writer.write_all(&bounded(line, self.format))?;
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.writer.flush()
    }
}

fn bounded(line: &[u8], format: LogFormat) -> Cow<'_, [u8]> {
    if line.len() <= LONGEST {
        return line.into();
    }
    match format {
        LogFormat::Text => shortened_text(line).into(),
        LogFormat::Json => shortened_json(line).into(),
    }
}

fn shortened_text(line: &[u8]) -> Vec<u8> {
    // Room for what is said of the rest.
    let mut text = cut(&String::from_utf8_lossy(line), LONGEST - 64).to_owned();
    let left_out = line.len() - text.len();
    // Writing into a string does not fail.
    let _ = writeln!(text, " … {left_out} bytes left out");
    text.into_bytes()
}

/// The same fields, with shorter texts: a line stays an object.
fn shortened_json(line: &[u8]) -> Vec<u8> {
    let fields: Map<String, Value> = serde_json::from_slice(line).unwrap_or_default();
    for most in [1024, 256, 64] {
        let shorter = |(name, value): (&String, &Value)| {
            let value = match value {
                Value::String(text) if text.len() > most => {
                    let left_out = text.len() - cut(text, most).len();
                    format!("{} … {left_out} bytes left out", cut(text, most)).into()
                }
                value => value.clone(),
            };
            (name.clone(), value)
        };
        let text = Value::Object(fields.iter().map(shorter).collect()).to_string();
        if text.len() < LONGEST {
            return (text + "\n").into_bytes();
        }
    }
    let message = format!("a line of {} bytes was left out", line.len());
    (json!({"level": "WARN", "message": message, "target": "ztunnel::logging"}).to_string() + "\n")
        .into_bytes()
}

/// At most `most` bytes from the beginning.
pub(crate) fn cut(text: &str, most: usize) -> &str {
    &text[..text.floor_char_boundary(most)]
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn written(line: &str, format: LogFormat) -> String {
        let mut lines = BoundedLines { writer: Vec::new(), format };
        lines.write_all(line.as_bytes()).unwrap();
        String::from_utf8(lines.writer).unwrap()
    }

    #[test]
    fn a_long_line_of_text_says_how_much_is_left_out() {
        let short = "a line\n";
        assert_eq!(written(short, LogFormat::Text), short);
        let long = format!("WARN {}\n", "ä".repeat(30_000));
        let line = written(&long, LogFormat::Text);
        assert!(line.len() <= LONGEST && line.ends_with(" bytes left out\n"), "{line}");
        assert!(line.starts_with("WARN ää") && line.matches('\n').count() == 1);
    }

    #[test]
    fn a_long_line_of_json_keeps_its_fields() {
        let line = |words: &[&str]| {
            let words: Map<String, Value> =
                words.iter().enumerate().map(|(n, word)| (format!("word{n}"), (*word).into())).collect();
            let mut fields = json!({"level": "WARN", "reason": "method", "bytes_sent": 7});
            fields.as_object_mut().unwrap().extend(words);
            fields.to_string() + "\n"
        };
        let (long, quotes) = ("ä".repeat(30_000), "\"".repeat(30_000));
        for words in [vec![&*long], vec![&quotes], vec![&*long; 8], vec![&quotes; 20]] {
            let short = written(&line(&words), LogFormat::Json);
            assert!(short.len() <= LONGEST && short.ends_with('\n'), "{}", short.len());
            let fields: Value = serde_json::from_str(&short).unwrap();
            assert_eq!((&fields["reason"], &fields["bytes_sent"]), (&json!("method"), &json!(7)));
            assert!(fields["word0"].as_str().unwrap().ends_with(" bytes left out"));
        }
        let many = written(&line(&vec![&*long; 1000]), LogFormat::Json);
        assert!(many.len() <= LONGEST, "{}", many.len());
        assert!(many.contains("bytes was left out"), "{many}");
    }
}
