//! What was ignored of a pod's configuration: a limited number of sentences, whatever it says.

use std::ops::Deref;

/// How many sentences are kept.
const MAX_NOTES: usize = 32;
/// Bytes of one sentence.
const MAX_LENGTH: usize = 512;

/// Sentences for people. After the first [`MAX_NOTES`], one more says how many are left out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Notes {
    lines: Vec<String>,
    left_out: usize,
}

impl Notes {
    /// Adds a sentence, or counts it.
    pub fn push(&mut self, mut note: String) {
        if self.lines.len() < MAX_NOTES {
            note.truncate(note.floor_char_boundary(MAX_LENGTH));
            self.lines.push(note);
            return;
        }
        if self.left_out > 0 {
            self.lines.pop();
        }
        self.left_out += 1;
        self.lines.push(format!("{} more notes are left out", self.left_out));
    }
}

impl Deref for Notes {
    type Target = [String];

    fn deref(&self) -> &[String] {
        &self.lines
    }
}

impl FromIterator<String> for Notes {
    fn from_iter<T: IntoIterator<Item = String>>(notes: T) -> Self {
        let mut all = Self::default();
        notes.into_iter().for_each(|note| all.push(note));
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_notes_of_a_pod_are_few_and_short() {
        let notes: Notes = (0..10_000).map(|n| format!("{n} {}", "ä".repeat(10_000))).collect();
        assert_eq!(notes.len(), MAX_NOTES + 1);
        assert_eq!(notes[MAX_NOTES], "9968 more notes are left out");
        assert!(notes.iter().all(|note| note.len() <= MAX_LENGTH) && notes[0].starts_with("0 ä"));
    }
}
