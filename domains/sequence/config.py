"""What a recipe may say about sequences (torch-free)."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainValidator

from limbeck.core.run.config import OptimConfig
from limbeck.core.run.recipe import Strict, piece

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, lt=1)]
AlphabetName = Literal["dna", "rna", "protein"]
Chains = Annotated[str, BeforeValidator(lambda value: ",".join(map(str, value)) if isinstance(value, list) else value)]
Natural = Annotated[Any, PlainValidator(lambda value: None if value is None else piece("data", value, {}))]


class Design(Strict):
    """What every design keeps to."""

    template: str | None = None  # IUPAC codes, a letter a place
    avoid: str | None = None  # words such as GAATTC,GGATCC; for DNA on both strands
    gc: str | None = None  # shares such as 0.4-0.6
    homopolymer: Count | None = None  # letters of the longest run
    omit: str | None = None  # letters that do not occur
    bias: dict[str, float] = {}  # nats that are added to a letter's logit


class Masked(Strict):
    """A masked model: the name of an embedded one, or a folder that `limbeck export` wrote."""

    model: str = "fly-upstream"
    length: Count | None = None  # letters a sequence; null: what it was trained on
    design: Design = Design()


class Cnn(Strict):
    """Dilated convolutions."""

    kind: Literal["cnn"] = "cnn"
    width: Count = 64
    kernel: Count = 9
    dilations: list[Count] = [1, 1, 4, 16, 1, 1, 4, 16]


class EsmNet(Strict):
    """A transformer of ESM-2's build (protein)."""

    kind: Literal["esm"] = "esm"
    width: Count = 128
    layers: Count = 4
    heads: Count = 4


class Fresh(Strict):
    """A masked model with random weights, to be trained."""

    alphabet: AlphabetName = "dna"
    length: Count = 200
    schedule: Literal["linear", "cosine"] = "linear"  # of masks
    net: Annotated[Cnn | EsmNet, Field(discriminator="kind")] = Cnn()


class Tuned(Strict):
    """The teacher to be tuned, with its walk of `steps`."""

    steps: Count = 64
    places: bool = False  # adds an embedding of each place, at first 0, for goals that lie at places (nets of kind cnn)


class Designs(Strict):
    """How designs are shown, drawn and written."""

    steps: Count = 64  # of the teacher's walk
    n: Count = 1  # sequences of each prompt, where samples are asked for
    shown: Count = 3  # sequences spelled out below a logo
    alphabet: AlphabetName | None = None  # of recipes without a model; null: the model's


class Quality(Strict):
    """Designs beside the pretrained model's samples, natural sequences and what chance makes of those."""

    count: Annotated[int, Field(ge=2)] = 64  # sequences of each generator
    natural: Natural = None  # where natural sequences come from; null: the recipe's data
    pool: Count = 32768  # natural sequences among which high scorers are sought
    top: Share = 0.1  # of them that count as high scorers, by the trained rewards
    kmer: Count | None = None  # null: 6 letters, 3 of a protein
    steps: Count = 64  # of the pretrained model's walk, where the recipe does not say
    levels: Count = 32  # times of the likelihood


class Windows(Strict):
    """Windows of 200 bases of the embedded fly regions; those of chromosome X are held out."""

    role: Literal["generator", "oracle-a", "oracle-b"] = "generator"
    template: str = ""  # what tuning starts from: letters to keep and N elsewhere; empty: nothing is fixed
    best: Share | None = None  # of `among` windows, those that `by` scores highest are learned from; null: all are
    by: str = "fly-a"  # an oracle: an embedded one, or the run of your own
    among: Count = 32768


class SpliceSites(Strict):
    """Natural windows of 200 bases in which a natural donor and a natural acceptor site stand at fixed places."""

    role: Literal["generator", "oracle-a", "oracle-b"] = "generator"
    template: str = ""  # what tuning starts from
    donor: Count = 61  # the first base of the intron, counted from 1
    acceptor: Count = 140  # the last base of the intron
    least: Share = 0.95  # probability of a site that counts
    regions: Count = 1024  # of the fly, among which sites are sought


class Fasta(Strict):
    """The user's own sequences, cut into windows."""

    path: str
    alphabet: AlphabetName = "dna"
    length: Count = 200
    held_out: Share = 0.1  # of the windows, near-duplicates together


class Likelihood(Strict):
    """How well a masked model predicts held-out sequences, and whether its samples have their k-mers."""

    count: Count = 512
    kmer: Count = 4
    steps: Count = 64  # of a sample's walk


class Starts(Strict):
    """Windows at transcription starts against distal ones, from one oracle's arms."""

    role: Literal["oracle-a", "oracle-b"] = "oracle-a"


class Table(Strict):
    """A CSV file with the columns sequence and value."""

    path: str
    alphabet: AlphabetName = "dna"
    held_out: Share = 0.2  # near-duplicates together


class Reader(Strict):
    """A net that reads a sequence and says one number."""

    net: Literal["pooled", "attentive"] = "pooled"
    alphabet: AlphabetName = "dna"
    width: Count = 128
    kernel: Count = 15
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.3


class Fit(Strict):
    """Learns a number from sequences: logits of a yes or no, or values."""

    task: Literal["classify", "regress"] = "regress"
    bootstrap: bool = True  # each member of an ensemble weighs the sequences in a way of its own
    optim: OptimConfig = OptimConfig(lr=1e-3)


class OracleQuality(Strict):
    """How right an oracle is on held-out sequences."""

    curve: list[Share] = []  # shares of the data to learn from again, for the learning curve


class Oracle(Strict):
    """What an oracle says of a sequence."""

    model: str  # the name of an embedded one, a run folder, or an exported file
    rule: Literal["mean", "min", "lower"] = "lower"
    width: Annotated[float, Field(ge=0)] = 1.0  # of the lower confidence bound, in deviations of the members
    strands: Literal["given", "both"] = "given"  # "both": the mean over the sequence and its reverse complement


class Splice(Strict):
    """How good a splice site MMSplice takes a place for."""

    site: Literal["donor", "acceptor"] = "donor"
    position: Count  # from 1: the first base of the intron (donor), or its last one (acceptor)
    scale: Literal["probability", "logit"] = "probability"


class Motif(Strict):
    """How much of a motif of JASPAR 2020 a sequence has."""

    id: str  # MA0139.1, MA0139 (its newest version) or a name that only one motif has
    strands: Literal["given", "both"] = "both"
    reduce: Literal["occupancy", "odds", "best"] = "occupancy"
    gc: Share = 0.5  # of the background
    pvalue: Share = 1e-4  # of a window at which a site is half occupied


class Ehrlich(Strict):
    """An Ehrlich function: spaced motifs on sequences without banned neighbours; its largest value is 1."""

    motifs: Count = 2
    motif: Count = 4  # letters of a motif
    length: Count = 200  # letters of a sequence
    quantise: Count | None = None  # steps of a motif's presence; null: one a letter
    seed: int = 0
    alphabet: AlphabetName = "dna"


class Gc(Strict):
    """The share of G and C within a window."""

    low: Annotated[float, Field(ge=0, le=1)] = 0.4
    high: Annotated[float, Field(ge=0, le=1)] = 0.6


class Homopolymer(Strict):
    """No long runs of one letter."""

    longest: Count = 4


class Fold(Strict):
    """The folding energy a base, of the sequence as RNA."""

    goal: Literal["stable", "open"] = "stable"


class Mpnn(Strict):
    """ProteinMPNN on one backbone."""

    structure: str = "1A8O"  # an embedded one, or a PDB or mmCIF file, plain or gzipped
    chain: str | None = None  # null: the first protein; "A,B" designs A beside a B whose sequence is kept
    tied: Chains = ""  # "A,B" or [A, B]: chains that get the same letters, residue by residue (homo-oligomers)
    weights: str = "v_48_020"  # embedded ones, or a file of `limbeck export --format sequence.mpnn`
    fixed: str = ""  # residues that keep their native letter, by the file's numbers: 10-20,35
    omit: str = ""  # letters that are not designed, such as CM
    bias: dict[str, float] = {}  # nats that are added to a letter's logit, before the temperature
    temperature: Annotated[float, Field(gt=0, le=10)] = 0.1  # divides the logits, of walks and likelihoods alike


class MpnnNll(Strict):
    """How likely ProteinMPNN finds a sequence on its backbone, in nats a residue."""

    weights: str = "soluble_v_48_020"
    structure: str | None = None  # null: the teacher's
    chain: str | None = None
    tied: Chains = ""
    orders: Count = 4  # orders of reading that are averaged; they are the same in every call
    seed: int = 0


class Contacts(Strict):
    """A contact potential of hydropathy and charge over the backbone's contacts."""

    structure: str | None = None  # null: the teacher's
    chain: str | None = None
    tied: Chains = ""
    cutoff: Annotated[float, Field(gt=0)] = 8.0  # Angstrom between beta carbons


class ProtParam(Strict):
    """A property of a protein's sequence by Biopython's ProtParam."""

    property: Literal["instability", "gravy", "isoelectric", "aromaticity"] = "instability"
    target: float | None = None  # null: the more the better (of instability: the less)
