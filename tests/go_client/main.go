// Walks and verifies a whole log with Go's own client code, golang.org/x/mod/sumdb/note and
// golang.org/x/mod/sumdb/tlog, unmodified. What stands here is only the plumbing between them and
// the log: paths, HTTP, and reading a checkpoint's three lines (tlog.ParseTree wants the first
// line of Go's own database).
//
//	go-client URL VKEY [OLD-CHECKPOINT-FILE]
//
// It opens the checkpoint with the key; reads every hash tile through tlog.TileHashReader, which
// holds each against the signed root; hashes every entry of every bundle and holds it against the
// tree, and proves it as a record; and proves that the tree of the older checkpoint, if given, is
// the beginning of this one. One line on stdout when all is well; else one on stderr and status 1.
package main

import (
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strconv"
	"strings"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

const (
	height = 8 // of a C2SP tile; sumdb writes it into the path, C2SP does not
	width  = 1 << height
)

// tiles reads tiles over HTTP. It is tlog.TileReader.
type tiles struct {
	url   string
	bytes int
}

func (t *tiles) Height() int { return height }

func (t *tiles) SaveTiles([]tlog.Tile, [][]byte) {}

func (t *tiles) ReadTiles(wanted []tlog.Tile) ([][]byte, error) {
	found := make([][]byte, len(wanted))
	for i, tile := range wanted {
		data, err := t.get(path(tile))
		if err != nil {
			return nil, err
		}
		found[i] = data
	}
	return found, nil
}

// path turns sumdb's tile/8/0/x001/234 into C2SP's tile/0/x001/234.
func path(tile tlog.Tile) string {
	rest := strings.TrimPrefix(tile.Path(), "tile/8/")
	return "tile/" + strings.Replace(rest, "data/", "entries/", 1)
}

func (t *tiles) get(path string) ([]byte, error) {
	answer, err := http.Get(t.url + "/" + path)
	if err != nil {
		return nil, err
	}
	defer answer.Body.Close()
	data, err := io.ReadAll(io.LimitReader(answer.Body, 64<<20))
	if err != nil {
		return nil, err
	}
	if answer.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s: %s", path, answer.Status)
	}
	t.bytes += len(data)
	return data, nil
}

// open is a checkpoint's tree, signed by the one key.
func open(data []byte, verifier note.Verifier) (tlog.Tree, error) {
	opened, err := note.Open(data, note.VerifierList(verifier))
	if err != nil {
		return tlog.Tree{}, err
	}
	lines := strings.Split(opened.Text, "\n")
	if len(lines) != 4 || lines[0] != verifier.Name() || lines[3] != "" {
		return tlog.Tree{}, errors.New("the checkpoint is not origin, size and root of this log")
	}
	size, err := strconv.ParseInt(lines[1], 10, 64)
	if err != nil {
		return tlog.Tree{}, err
	}
	root, err := base64.StdEncoding.DecodeString(lines[2])
	if err != nil || len(root) != tlog.HashSize {
		return tlog.Tree{}, errors.New("the root is no hash")
	}
	tree := tlog.Tree{N: size}
	copy(tree.Hash[:], root)
	return tree, nil
}

// records are the entries of a bundle, each behind its length.
func records(data []byte) ([][]byte, error) {
	var found [][]byte
	for len(data) > 0 {
		if len(data) < 2 || len(data) < 2+int(binary.BigEndian.Uint16(data)) {
			return nil, errors.New("an entry runs past the end of its bundle")
		}
		end := 2 + int(binary.BigEndian.Uint16(data))
		found = append(found, data[2:end])
		data = data[end:]
	}
	return found, nil
}

// walk checks every entry of the tree.
func walk(reader *tiles, tree tlog.Tree) error {
	hashes := tlog.TileHashReader(tree, reader)
	for start := int64(0); start < tree.N; start += width {
		count := min(width, tree.N-start)
		bundle := tlog.Tile{H: height, L: -1, N: start / width, W: int(count)}
		data, err := reader.get(path(bundle))
		if err != nil {
			return err
		}
		entries, err := records(data)
		if err != nil || int64(len(entries)) != count {
			return fmt.Errorf("bundle %d holds %d entries, expected %d: %v",
				bundle.N, len(entries), count, err)
		}
		indexes := make([]int64, count)
		for i := range indexes {
			indexes[i] = tlog.StoredHashIndex(0, start+int64(i))
		}
		stored, err := hashes.ReadHashes(indexes)
		if err != nil {
			return err
		}
		for i, entry := range entries {
			index := start + int64(i)
			if tlog.RecordHash(entry) != stored[i] {
				return fmt.Errorf("entry %d does not hash to its leaf", index)
			}
			if written := int64(binary.BigEndian.Uint64(entry)); written != index {
				return fmt.Errorf("entry %d says that it is entry %d", index, written)
			}
			if index%61 != 0 && index != tree.N-1 {
				continue // each proof reads its tiles anew; some are enough beside every hash
			}
			proof, err := tlog.ProveRecord(tree.N, index, hashes)
			if err != nil {
				return err
			}
			if err := tlog.CheckRecord(proof, tree.N, tree.Hash, index, stored[i]); err != nil {
				return err
			}
		}
	}
	return nil
}

func check(url, vkey string, older []byte) (string, error) {
	verifier, err := note.NewVerifier(vkey)
	if err != nil {
		return "", err
	}
	reader := &tiles{url: url}
	data, err := reader.get("checkpoint")
	if err != nil {
		return "", err
	}
	tree, err := open(data, verifier)
	if err != nil {
		return "", err
	}
	if err := walk(reader, tree); err != nil {
		return "", err
	}
	extends := int64(0)
	if older != nil {
		old, err := open(older, verifier)
		if err != nil {
			return "", err
		}
		proof, err := tlog.ProveTree(tree.N, old.N, tlog.TileHashReader(tree, reader))
		if err != nil {
			return "", err
		}
		if err := tlog.CheckTree(proof, tree.N, tree.Hash, old.N, old.Hash); err != nil {
			return "", err
		}
		extends = old.N
	}
	return fmt.Sprintf("ok size=%d root=%x extends=%d", tree.N, tree.Hash[:], extends), nil
}

func main() {
	if len(os.Args) < 3 || len(os.Args) > 4 {
		fmt.Fprintln(os.Stderr, "usage: go-client URL VKEY [OLD-CHECKPOINT-FILE]")
		os.Exit(2)
	}
	var older []byte
	var err error
	if len(os.Args) == 4 {
		older, err = os.ReadFile(os.Args[3])
	}
	said := ""
	if err == nil {
		said, err = check(os.Args[1], os.Args[2], older)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Println(said)
}
