//! The program of the pods in the end-to-end tests: `pod ROLE ARGUMENT…`.

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    testbed::roles::play(&words.iter().map(String::as_str).collect::<Vec<_>>());
}
