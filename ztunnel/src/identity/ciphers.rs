//! Which implementation of AES-GCM is the fastest on this node's processor.
//!
//! Encryption is a fifth of what bulk traffic costs. aws-lc and ring take turns in being ahead: aws-lc
//! has code for AVX-512, and on processors with VAES and without AVX-512 it runs its code for older
//! ones, at half of ring's speed. So each seals some records at the start, which takes a millisecond.
//! Everything else, key exchange and signatures, is aws-lc's.

use std::{
    sync::LazyLock,
    time::{Duration, Instant},
};

use rustls::{
    CipherSuite, ContentType, Error, ProtocolVersion, SupportedCipherSuite,
    crypto::{
        CryptoProvider, aws_lc_rs,
        cipher::{AeadKey, Iv, MessageEncrypter, OutboundPlainMessage},
        ring,
    },
};
use tracing::{info, warn};

/// As bulk traffic has them: the largest ones.
const RECORD: u16 = 16 * 1024;
/// How often each implementation is timed. The best time counts: others have been interrupted.
const ROUNDS: usize = 6;
/// How many records are sealed each time.
const RECORDS: u8 = 8;
/// Whoever needs longer for a record, such as an emulated processor, has started late enough: one
/// record of each decides.
const ENOUGH: Duration = Duration::from_millis(10);
/// How much faster than aws-lc ring must be, in percent, to be chosen: a difference that the next start
/// would find as well.
const CLEARLY: u32 = 10;

static RING_IS_FASTER: LazyLock<bool> = LazyLock::new(|| match measure() {
    Ok((aws_lc, ring)) => {
        let is_faster = is_clearly_faster(ring, aws_lc);
        let chosen = if is_faster { "ring" } else { "aws-lc" };
        info!(chosen, aws_lc = per_second(aws_lc), ring = per_second(ring), "AES-GCM");
        is_faster
    }
    Err(error) => {
        warn!(%error, "cannot tell which AES-GCM is the fastest; aws-lc's is used");
        false
    }
});

/// aws-lc, with the fastest implementations of its cipher suites.
pub(super) fn provider() -> CryptoProvider {
    with_suites_of_ring(*RING_IS_FASTER)
}

fn with_suites_of_ring(has_ring: bool) -> CryptoProvider {
    let mut provider = aws_lc_rs::default_provider();
    for suite in provider.cipher_suites.iter_mut().filter(|_| has_ring) {
        let same = |other: &&SupportedCipherSuite| other.suite() == suite.suite();
        if let Some(faster) = ring::ALL_CIPHER_SUITES.iter().find(same) {
            *suite = *faster;
        }
    }
    provider
}

fn is_clearly_faster(one: Duration, other: Duration) -> bool {
    one * (100 + CLEARLY) < other * 100
}

/// The best times of aws-lc and of ring for a record.
fn measure() -> Result<(Duration, Duration), Error> {
    let mut aws_lc = Sealer::of(aws_lc_rs::ALL_CIPHER_SUITES)?;
    let mut ring = Sealer::of(ring::ALL_CIPHER_SUITES)?;
    let began = Instant::now();
    // Counted only here: the first use detects the processor and prepares tables.
    let first = (aws_lc.time(1)?, ring.time(1)?);
    if began.elapsed() > ENOUGH {
        return Ok(first);
    }
    let mut best = (Duration::MAX, Duration::MAX);
    for _ in 0..ROUNDS {
        best = (best.0.min(aws_lc.time(RECORDS)?), best.1.min(ring.time(RECORDS)?));
    }
    Ok(best)
}

/// Such as `5.3 GB/s`.
fn per_second(time: Duration) -> String {
    format!("{:.1} GB/s", f64::from(RECORD) / time.as_secs_f64().max(1e-9) / 1e9)
}

/// Seals records as a TLS connection does.
struct Sealer {
    encrypter: Box<dyn MessageEncrypter>,
    record: Vec<u8>,
    sequence: u64,
}

impl Sealer {
    /// By the AES-256-GCM of TLS 1.3 among `suites`.
    fn of(suites: &[SupportedCipherSuite]) -> Result<Self, Error> {
        let suite = suites.iter().find(|suite| suite.suite() == CipherSuite::TLS13_AES_256_GCM_SHA384);
        let suite = suite.and_then(SupportedCipherSuite::tls13);
        let suite = suite.ok_or_else(|| Error::General("AES-256-GCM is missing".to_owned()))?;
        let encrypter = suite.aead_alg.encrypter(AeadKey::from([7; 32]), Iv::new([7; 12]));
        Ok(Self { encrypter, record: vec![7; RECORD.into()], sequence: 0 })
    }

    /// How long a record takes, if `records` are sealed.
    fn time(&mut self, records: u8) -> Result<Duration, Error> {
        let began = Instant::now();
        for _ in 0..records {
            let message = OutboundPlainMessage {
                typ: ContentType::ApplicationData,
                version: ProtocolVersion::TLSv1_2,
                payload: self.record.as_slice().into(),
            };
            std::hint::black_box(self.encrypter.encrypt(message, self.sequence)?);
            self.sequence += 1;
        }
        Ok(began.elapsed() / u32::from(records))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_implementations_have_the_same_suites_in_the_same_order() {
        let names = |has_ring| -> Vec<CipherSuite> {
            let provider = with_suites_of_ring(has_ring);
            provider.cipher_suites.iter().map(SupportedCipherSuite::suite).collect()
        };
        assert_eq!(names(true), names(false));
        // They compare equal by their names.
        let at = |suite: &SupportedCipherSuite| match suite {
            SupportedCipherSuite::Tls12(suite) => std::ptr::from_ref(*suite).addr(),
            SupportedCipherSuite::Tls13(suite) => std::ptr::from_ref(*suite).addr(),
        };
        let rings: Vec<usize> = ring::ALL_CIPHER_SUITES.iter().map(at).collect();
        let is_rings = |suite: &SupportedCipherSuite| rings.contains(&at(suite));
        assert!(with_suites_of_ring(true).cipher_suites.iter().all(is_rings));
        assert!(!with_suites_of_ring(false).cipher_suites.iter().any(is_rings));
    }

    #[test]
    fn only_a_clear_difference_decides() {
        let time = Duration::from_micros;
        assert!(is_clearly_faster(time(50), time(110)));
        assert!(!is_clearly_faster(time(100), time(109)) && !is_clearly_faster(time(110), time(50)));
        let (aws_lc, ring) = measure().unwrap();
        assert!(aws_lc > Duration::ZERO && ring > Duration::ZERO);
        eprintln!("AES-256-GCM: aws-lc {}, ring {}", per_second(aws_lc), per_second(ring));
    }

    /// What one seals the other opens: a peer does not notice.
    #[test]
    fn records_are_the_same_bytes() {
        let sealed = |suites| {
            let mut sealer = Sealer::of(suites).unwrap();
            let message = OutboundPlainMessage {
                typ: ContentType::ApplicationData,
                version: ProtocolVersion::TLSv1_2,
                payload: sealer.record.as_slice().into(),
            };
            sealer.encrypter.encrypt(message, 3).unwrap().encode()
        };
        assert!(sealed(aws_lc_rs::ALL_CIPHER_SUITES) == sealed(ring::ALL_CIPHER_SUITES));
    }
}
