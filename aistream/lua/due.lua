-- The sessions whose deadline has passed, with the state that says what somebody must do about them.
-- KEYS  1 deadlines zset, 2 tick hash, 3 origins zset, 4 owed zset
-- ARGV  1 most to look at, 2 lease in ms, 3 prefix of session keys (same slot), 4 a random word, 5 '1' if the asking worker has
--       lost a connection since it last asked, 6 ms in which all workers notice such a loss, 7 most callbacks to give,
--       8 most of them to one origin, 9.. pairs: an origin, how many places are left for it
-- gives {birth, number of this look, '1' if there was no place for a callback that is due, {id, state, origin, id, state, …}};
--       an origin for ended sessions, of which a callback is due
-- Atomic: the tick tells whether anybody has been looking. After a silence of over two seconds (Redis was away, or every
-- worker), or a lost connection (behind it may be another Redis now, where leases stand as they were), no running session is
-- given for one lease, since healthy owners must be able to renew first; and no callback until all had the time to say what
-- they have settled. Birth and number tell a worker that the store has been emptied, or has gone back to an earlier state.
local now = now_ms()
local tick = redis.call('HMGET', KEYS[2], 'at', 'calm_until', 'birth', 'unsure_at')
local calm_until, unsure_at = tonumber(tick[2]) or 0, tonumber(tick[4]) or now
local unsure = not tick[3] or ARGV[5] == '1'
if unsure then
  unsure_at = now
end
if unsure or now - (tonumber(tick[1]) or 0) > 2000 then
  calm_until = now + ARGV[2]
end
redis.call('HSET', KEYS[2], 'at', now, 'calm_until', calm_until, 'unsure_at', unsure_at, 'birth', tick[3] or ARGV[4])
local number = redis.call('HINCRBY', KEYS[2], 'looks', 1)
redis.call('EXPIRE', KEYS[2], 86400)
local due = {}
local function give(id, state, origin)
  due[#due + 1] = id
  due[#due + 1] = state
  due[#due + 1] = origin
end
for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now, 'LIMIT', 0, ARGV[1])) do
  local state = redis.call('HGET', ARGV[3] .. id, 'state')
  if not state then
    redis.call('ZREM', KEYS[1], id)
  elseif state == 'pending' or state == 'running' and now >= calm_until then
    give(id, state, '')
  end
end
local total, left, more = tonumber(ARGV[7]), {}, '0'
for i = 9, #ARGV, 2 do
  left[ARGV[i]] = tonumber(ARGV[i + 1])
end
if now - unsure_at < tonumber(ARGV[6]) and tick[3] then
  total = 0
end
for _, origin in ipairs(total > 0 and redis.call('ZRANGEBYSCORE', KEYS[3], '-inf', now, 'LIMIT', 0, ARGV[1]) or {}) do
  local queue = KEYS[3] .. ':' .. origin
  local places = math.min(total, left[origin] or tonumber(ARGV[8]))
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', queue, '-inf', now, 'LIMIT', 0, places + 1)) do
    local s = redis.call('HMGET', ARGV[3] .. id, 'state', 'callback')
    if s[2] ~= 'owed' then
      redis.call('ZREM', queue, id)
      redis.call('ZREM', KEYS[4], id)
    elseif places > 0 then
      give(id, s[1], origin)
      places, total = places - 1, total - 1
    else
      more = '1'
    end
  end
  local first = redis.call('ZRANGE', queue, 0, 0, 'WITHSCORES')
  if first[1] then
    redis.call('ZADD', KEYS[3], first[2], origin)
  else
    redis.call('ZREM', KEYS[3], origin)
  end
end
return { tick[3] or ARGV[4], number, more, due }
